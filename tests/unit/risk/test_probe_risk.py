"""Claimed: a probe on answers reads each answer whole, wherever padding lies, and a failed risk is
computed again. Exact. The rest of probes as risk: test_probe.py.
"""

import math

import pytest
import torch
from support import oracles
from support.ranks import ALONE
from test_probe import H, ask, make_probe

from safereg_dist.data import collate
from safereg_dist.risk.probe_risk import (
    KnownRisks,
    ReferenceProbeRisk,
    Turns,
    pooled_turns,
    probed_turns,
)
from safereg_dist.storage.score_cache import ScoreCache
from safereg_dist.types import Row


def row(mask, prompt_ends):
    return Row(
        id="r",
        input_ids=list(range(3, 3 + len(mask))),
        loss_mask=mask,
        prompt_ends=prompt_ends,
        risk=None,
        prompt_key="00" * 32,
    )


def test_an_answer_is_read_with_its_last_token():
    """One answer in the middle, one at the end of the row."""
    probe = make_probe(position="response", pooling="mean_response")
    rows = [row([0, 0, 1, 1, 0, 1, 1, 1], [2, 5]), row([0, 1], [1])]
    assert probed_turns(probe, rows) == Turns([0, 0, 1], [2, 5, 1], [3, 7, 1])
    prompts = probed_turns(make_probe(), rows)
    assert prompts == Turns([0, 0, 1], [0, 0, 0], [1, 4, 0])


@pytest.mark.parametrize("pooling", ["last_response_token", "mean_response", "both_response"])
def test_rows_may_be_padded_on_the_left(pooling):
    probe = make_probe(position="response", pooling=pooling)
    turns = probed_turns(probe, [row([0, 1, 1], [1]), row([0, 0, 0, 1, 1], [3])])
    states = torch.randn(2, 5, H, generator=torch.Generator().manual_seed(0))
    got = pooled_turns(probe, states, [2, 5], turns)
    spans = states[0, 3:5], states[1, 3:5]
    want = [torch.from_numpy(oracles.pooled(span, pooling)).float() for span in spans]
    torch.testing.assert_close(got, torch.stack(want))


class Trunk:
    """A reference whose states are not finite until it is mended."""

    value = math.nan

    def prompt_states(self, input_ids, num_layers):
        """The same state at every token."""
        return torch.full((*input_ids.shape, H), self.value)


def test_a_failed_risk_is_not_kept_on_disk(tmp_path):
    known = KnownRisks(ScoreCache(tmp_path / "scores.sqlite"), "scorer")
    trunk, batch = Trunk(), collate([row([0, 0, 1], [2])], pad_id=0)

    def risk():
        estimator = ReferenceProbeRisk(
            make_probe(), trunk, ranks=ALONE, rows_per_pass=2, known=known
        )
        return ask(estimator, batch)[0]

    assert math.isnan(risk())
    trunk.value = 0.5
    mended = risk()
    assert 0 <= mended <= 1
    trunk.value = math.nan
    assert risk() == mended  # from the disk
