"""One rank of the tests of signals that fail on one rank. Arguments: folder of the test.

Rank 1's judge or disk fails; every part writes the error that each rank has seen, and the
collectives that it ran. The reference makes a collective in each pass, as under ZeRO-3.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from step_worker import COLLECTIVES

from safereg_dist.coefficient import Coefficient
from safereg_dist.config import RegularizerConfig
from safereg_dist.data import filler
from safereg_dist.errors import CheckpointError, CriticUnavailable
from safereg_dist.parallel.comm import Ranks, capture
from safereg_dist.risk.probe import Probe
from safereg_dist.risk.probe_risk import KnownRisks, ReferenceProbeRisk
from safereg_dist.risk.stage import RiskSource, RiskStage, WeightedSource
from safereg_dist.run.gate import row_risks
from safereg_dist.types import Row

H = 8


class ShardedTrunk:
    """A reference that no rank can run alone."""

    def prompt_states(self, input_ids, num_layers):
        """States that hang on the tokens up to each."""
        torch.distributed.all_reduce(torch.zeros(3))
        table = torch.randn(400, H, generator=torch.Generator().manual_seed(0))
        return table[input_ids.cumsum(1) % 400]


class Judge(RiskSource):
    """A source that fails where it is told to."""

    name = "judge"

    def __init__(self, fails: bool):
        self.fails = fails

    def __call__(self, rows, probed=None, *, in_first_epoch):
        """Half a risk for every row."""
        if self.fails:
            raise CriticUnavailable("a judgement failed")
        return [0.5] * len(rows)


class Disk:
    """A score cache that cannot be read, or not be written."""

    def __init__(self, fails: str):
        self.fails = fails

    def get_many(self, scorer, keys):
        """Nothing is known."""
        return self._answer("read", {})

    def put_many(self, scorer, scores):
        """Stores nothing."""
        self._answer("write", None)

    def _answer(self, verb, value):
        if verb == self.fails:
            raise CheckpointError(f"the disk does not {verb}")
        return value


class Stream:
    """Rows of a rank, as `Sampler` has them."""

    def __init__(self, rows):
        self.rows = rows

    def first_rows(self, count):
        """The first rows."""
        yield from self.rows[:count]


def probe() -> Probe:
    """Any probe."""
    return Probe(
        layer=1, pooling="last_prompt_token", mean=torch.zeros(H), scale=torch.ones(H),
        weight=torch.ones(H), bias=0.0, threshold=0.5, fingerprint="f" * 64,
    )  # fmt: skip


def some_row(name: str, salt: int) -> Row:
    """A row unlike any other."""
    return Row(
        id=name, input_ids=[1, salt, 2, 3], loss_mask=[0, 0, 1, 1], prompt_ends=[2], risk=None,
        prompt_key=f"{salt:064x}",
    )  # fmt: skip


def main() -> None:
    """All parts, in the same order on every rank."""
    folder = Path(sys.argv[-1])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    ranks = Ranks(
        rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"), dp_group=group
    )
    rows = [some_row(f"r{rank}-{index}", 12 * rank + index) for index in range(12)]
    is_bad = rank == 1

    def frozen(fails: str = "") -> ReferenceProbeRisk:
        known = KnownRisks(Disk(fails if is_bad else ""), "any")  # type: ignore[arg-type]
        return ReferenceProbeRisk(
            probe(), ShardedTrunk(), ranks=ranks, rows_per_pass=2, known=known
        )

    def parts(*estimators) -> RiskStage:
        return RiskStage(
            [WeightedSource(f"c{i}", e, 0.5) for i, e in enumerate(estimators)], rule="max"
        )

    def step(stage: RiskStage, granularity: str) -> None:
        """What `SafetyRegularizer` does up to the agreement."""
        coefficient = Coefficient(
            RegularizerConfig(granularity=granularity), threshold=None, ranks=ranks
        )
        risk = capture(stage, rows[:6], in_first_epoch=True)
        ranks.raise_if_any_failed(capture(coefficient, rows[:6], risk))

    def screen(stage: RiskStage) -> None:
        screened = row_risks(
            Stream(rows), stage, count=12, micro_batch_size=4, filler=filler(0), ranks=ranks  # type: ignore[arg-type]
        )  # fmt: skip
        ranks.sum_(torch.tensor([len(list(screened))]))

    cases = {
        f"{name} {granularity}": (step, stage(), granularity)
        for granularity in ("sequence", "batch")
        for name, stage in {
            "judge": lambda: parts(Judge(is_bad), frozen()),
            "read": lambda: parts(frozen("read"), frozen()),
            "write": lambda: parts(frozen("write"), frozen()),
        }.items()
    }
    cases["screen judge"] = (screen, parts(Judge(is_bad), frozen()))
    cases["screen judge alone"] = (screen, parts(Judge(is_bad)))
    cases["screen write"] = (screen, parts(frozen("write"), frozen()))
    found = {}
    for name, (act, *arguments) in cases.items():
        begin = len(COLLECTIVES)
        error = capture(act, *arguments).error
        found[name] = {
            "error": f"{type(error).__name__}: {error}",
            "collectives": COLLECTIVES[begin:],
        }
        (folder / f"found.rank{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
