"""Claimed: the drift monitor measures what it says, on the steps it says, and does what is asked.

The judge is NumPy over the same states: recall at the threshold of the policy side against the
reference side. Rounds: 1e-5 in probabilities; counts and decisions are exact. Several ranks under
ZeRO-3 are in tests/distributed.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.builders import random_rows, word_tokenizer

from safereg_dist.data import collate, filler, tokenize_row
from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.risk.drift import MIN_FLAGGED, WatchedPolicyProbe
from safereg_dist.risk.probe import Probe
from safereg_dist.risk.probe_risk import ReferenceProbeRisk
from safereg_dist.risk.stage import ProbedStates

ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), dp_group=None)
H, THRESHOLD = 16, 0.6
TOKENIZER = word_tokenizer()


class TableTrunk:
    """A reference whose state at a token hangs on all tokens up to it."""

    def __init__(self):
        self.table = torch.randn(400, H, generator=torch.Generator().manual_seed(0))
        self.calls = 0

    def prompt_states(self, input_ids, num_layers):
        self.calls += 1
        return self.table[input_ids.cumsum(1) % 400]


def probe():
    generator = torch.Generator().manual_seed(1)
    return Probe(
        layer=2,
        pooling="last_prompt_token",
        mean=torch.zeros(H),
        scale=torch.ones(H),
        weight=torch.randn(H, generator=generator),
        bias=0.3,
        threshold=THRESHOLD,
        fingerprint="f" * 64,
    )


def batches(count, rows=24):
    raws = random_rows(count * rows, seed=7, risk=False)
    made = [tokenize_row(raw, "", TOKENIZER, default_id="") for raw in raws]
    return [collate([*made[i * rows : (i + 1) * rows], filler(0)], pad_id=0) for i in range(count)]


def watched(mode, *, every=1, recall=0.9, trunk=None):
    trunk = trunk or TableTrunk()
    frozen = ReferenceProbeRisk(probe(), trunk, ranks=ALONE, rows_per_pass=8, is_asked_seldom=True)
    settings = SimpleNamespace(drift=mode, drift_every=every, drift_recall=recall)
    return WatchedPolicyProbe(
        probe(), frozen, settings=settings, threshold=THRESHOLD, ranks=ALONE
    ), trunk


def states_of(batch, trunk):
    return trunk.table[batch.input_ids.cumsum(1) % 400]


def risks_of(batch, states):
    """By NumPy: sigmoid of the projection of the last prompt token, None for the filler."""
    p = probe()
    found = []
    for index, row in enumerate(batch.rows):
        if not row.prompt_ends:
            found.append(None)
            continue
        state = states[index, row.prompt_ends[-1] - 1].double().numpy()
        found.append(1 / (1 + np.exp(-(state @ p.weight.double().numpy() + p.bias))))
    return found


def ask(monitor, batch, states):
    """The risk of a batch's rows in a forward with these states; every row was planned before."""
    probed = ProbedStates(states, batch.row_begins)
    return monitor(batch.rows, probed, in_first_epoch=False)


def step(monitor, number, batch, states):
    monitor.begin_step(number)
    risk = ask(monitor, batch, states)
    return risk, monitor.end_step(monitor.take_sums())


def test_recall_and_gap_are_those_of_numpy(capsys):
    monitor, trunk = watched("warn", recall=0.01)
    (batch,) = batches(1)
    frozen = states_of(batch, trunk)
    moved = frozen + 0.6 * torch.randn(frozen.shape, generator=torch.Generator().manual_seed(3))
    risk, row = step(monitor, 0, batch, moved)
    own, judge = risks_of(batch, moved)[:-1], risks_of(batch, frozen)[:-1]
    assert risk[:-1] == pytest.approx(own, abs=1e-5)
    assert risk[-1] is None
    flagged = [r >= THRESHOLD for r in judge]
    found = [r >= THRESHOLD for r in own]
    assert 3 < sum(flagged) < 21
    assert 0 < np.mean(np.array(found)[flagged]) < 1
    assert row["probe_recall"] == pytest.approx(np.mean(np.array(found)[flagged]))
    assert row["probe_gap"] == pytest.approx(np.mean(np.abs(np.subtract(own, judge))), abs=1e-5)
    assert capsys.readouterr().err == ""


def test_only_due_steps_ask_the_reference():
    monitor, trunk = watched("warn", every=3)
    (batch,) = batches(1)
    states = states_of(batch, trunk)
    calls = []
    for number in range(7):
        before = trunk.calls
        _, row = step(monitor, number, batch, states)
        calls.append(trunk.calls - before)
        assert bool(row) == (number % 3 == 0)
    # 24 rows by eights the first time; their risk is known from then on.
    assert calls == [3, 0, 0, 0, 0, 0, 0]


def test_one_micro_batch_of_a_step_is_compared():
    monitor, trunk = watched("warn")
    first, second = batches(2)
    monitor.begin_step(0)
    ask(monitor, first, states_of(first, trunk))
    ask(monitor, second, states_of(second, trunk))
    assert trunk.calls == 3
    assert monitor.take_sums()["drift_rows"] == 24


def test_a_quiet_rank_runs_as_many_passes():
    """Realigning needs states of every check: no rank may run fewer passes than the others."""
    monitor, trunk = watched("realign")
    batch = collate([filler(0)] * 25, pad_id=0)
    _, row = step(monitor, 0, batch, torch.zeros(25, 1, H))
    assert trunk.calls == 4
    assert row == {"probe_gap": 0.0}  # nothing flagged: no recall is claimed


def blind(batch):
    """States on which the probe finds nothing."""
    return -5 * probe().weight.expand(*batch.input_ids.shape, H)


def test_warn_goes_on_and_says_so(capsys):
    monitor, trunk = watched("warn")
    (batch,) = batches(1)
    _, row = step(monitor, 0, batch, blind(batch))
    assert row["probe_recall"] == 0
    text = capsys.readouterr().err
    assert text.count("finds 0%") == 1
    assert "risk.source=reference" in text
    assert monitor.name == "probe-policy"
    step(monitor, 1, batch, blind(batch))
    assert capsys.readouterr().err == ""  # nothing new
    for number in (2, 3):
        step(monitor, number, batch, states_of(batch, trunk))
    step(monitor, 4, batch, blind(batch))
    assert "finds" in capsys.readouterr().err


def test_fallback_takes_the_reference_from_then_on(capsys):
    monitor, trunk = watched("fallback")
    (batch,) = batches(1)
    step(monitor, 0, batch, blind(batch))
    assert monitor.has_fallen_back
    assert monitor.name == "probe-reference"
    risk, row = step(monitor, 1, batch, blind(batch))
    assert risk[:-1] == pytest.approx(risks_of(batch, states_of(batch, trunk))[:-1], abs=1e-5)
    assert row == {}
    assert "from now on" in capsys.readouterr().err


def test_few_flagged_rows_are_not_acted_upon():
    monitor, trunk = watched("fallback")
    pieces = batches(12, rows=3)
    flagged, fell_back_at = 0, None
    for number, batch in enumerate(pieces):
        judge = risks_of(batch, states_of(batch, trunk))[:-1]
        flagged += sum(r >= THRESHOLD for r in judge)
        step(monitor, number, batch, blind(batch))
        if monitor.has_fallen_back:
            fell_back_at = number
            break
        assert flagged < MIN_FLAGGED
    assert fell_back_at is not None
    assert flagged >= MIN_FLAGGED


def test_realignment_undoes_an_affine_drift():
    monitor, trunk = watched("realign")
    draw = torch.Generator().manual_seed(5)
    half = torch.randn(H, H, generator=draw) / 6
    stretch, shift = torch.eye(H) + half @ half.T, 2 * torch.randn(H, generator=draw)
    gaps = []
    for number, batch in enumerate(batches(12, rows=48)):
        _, row = step(monitor, number, batch, states_of(batch, trunk) @ stretch + shift)
        gaps.append(row["probe_gap"])
    assert monitor.name == "probe-policy-realigned"
    assert np.mean(gaps[4:]) < gaps[0] / 4


def test_a_checkpoint_without_its_half_is_refused(tmp_path):
    before, _ = watched("fallback")
    before.save_state(tmp_path / "risk0.safetensors")
    own = tmp_path / "risk0-drift.safetensors"
    whole = own.read_bytes()
    own.write_bytes(whole[:40])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="remove this checkpoint"):
            watched("fallback")[0].load_state(tmp_path / "risk0.safetensors")
        own.unlink(missing_ok=True)


def test_what_it_knows_goes_through_a_checkpoint(tmp_path):
    for mode in ("fallback", "realign"):
        before, trunk = watched(mode)
        (batch,) = batches(1)
        step(before, 0, batch, blind(batch) + states_of(batch, trunk))
        before.save_state(tmp_path / f"{mode}.safetensors")
        after, _ = watched(mode)
        after.load_state(tmp_path / f"{mode}.safetensors")
        assert after.has_fallen_back == before.has_fallen_back
        assert after.name == before.name
        states = states_of(batch, trunk)
        before.begin_step(1)
        after.begin_step(1)
        assert ask(after, batch, states) == ask(before, batch, states)
        sums = before.take_sums()
        assert after.take_sums() == sums
        assert after.end_step(sums) == before.end_step(sums)


def test_recall_is_of_the_newest_checks_that_hold_enough_rows():
    """Counts of all ranks, as `end_step` is given them: (flagged, found)."""
    monitor, _ = watched("warn", recall=0.1)
    recalls = []
    for number, (flagged, found) in enumerate([(8, 2), (5, 5), (4, 3), (0, 0), (9, 9)]):
        monitor.begin_step(number)
        total = {"drift_flagged": flagged, "drift_found": found, "drift_rows": 9, "drift_gap": 0}
        recalls.append(monitor.end_step(total)["probe_recall"])
    assert recalls == [2 / 8, 7 / 13, 8 / 9, 8 / 9, 1.0]
