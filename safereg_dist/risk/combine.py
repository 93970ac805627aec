"""Stage 3: the risk of every row from one signal or several, reviewers' decisions included.

single     r = r_1
max        r = max_c s(r_c)                      s maps each signal's threshold to 0.5, so that
weighted   r = sum_c w_c s(r_c) / sum_c w_c      signals calibrated apart can be compared
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from safereg_dist.parallel.comm import held
from safereg_dist.risk.base import Risk, RiskEstimator
from safereg_dist.risk.override import Override
from safereg_dist.risk.probe import rescale
from safereg_dist.types import MicroBatch, Row, RowRisks

COMMON_THRESHOLD = 0.5
"""Where every signal sets in once it is rescaled."""


class Part(NamedTuple):
    """One signal of risk."""

    category: str
    """The category of harm it stands for; empty for the only signal of a run."""
    estimator: RiskEstimator
    threshold: float
    """Risk from which it counts, on its own scale."""
    weight: float = 1.0


class RiskStage:
    """Asks every signal, combines what they say, and counts it for the metrics."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        rule: str = "single",
        overrides: Mapping[str, Override] | None = None,
    ) -> None:
        """`rule` is `single` (one part), `max` or `weighted`."""
        assert rule != "single" or len(parts) == 1
        self.parts = tuple(parts)
        self.rule = rule
        self._overrides = dict(overrides or {})
        self._sums = dict.fromkeys(self.sum_names, 0.0)

    @property
    def name(self) -> str:
        """What gives the risk, for people."""
        if self.rule == "single":
            return self.parts[0].estimator.name
        return f"{self.rule}({', '.join(part.category for part in self.parts)})"

    @property
    def threshold(self) -> float:
        """Risk from which a row counts as risky, on the scale of the combined risk."""
        return self.parts[0].threshold if self.rule == "single" else COMMON_THRESHOLD

    @property
    def reads_policy(self) -> bool:
        """True where risk is known only after the policy's forward; the same on all ranks."""
        return any(getattr(part.estimator, "reads_policy", False) for part in self.parts)

    def __call__(self, batch: MicroBatch, policy_states: Tensor | None) -> RowRisks:
        """Risk of every row. Collectives: those of the signals, in their order."""
        # A signal that fails on one rank must not keep this rank from the next one's collectives.
        found = [held(part.estimator, batch, policy_states) for part in self.parts]
        for risk in found:
            if isinstance(risk, Exception):
                raise risk
        if self.rule == "single":
            risks = RowRisks(found[0], {}, [self.parts[0].estimator.name] * len(batch.rows), {})
        else:
            risks = self._combined(found)
        for part in self.parts:
            risks.notes.update(part.estimator.notes)
        self._override(batch, risks)
        self._count(batch, risks)
        return risks

    def _combined(self, found: list[Risk]) -> RowRisks:
        scaled = [
            [_rescaled(value, part.threshold) for value in risk]
            for part, risk in zip(self.parts, found, strict=True)
        ]
        values: Risk = []
        sources = []
        for row in zip(*scaled, strict=True):
            value, leader = self._combine_row(row)
            values.append(value)
            sources.append(f"{self.rule}:{self.parts[leader].category}")
        categories = [part.category for part in self.parts]
        return RowRisks(values, dict(zip(categories, scaled, strict=True)), sources, {})

    def _combine_row(self, row: Sequence[float | None]) -> tuple[float | None, int]:
        """The combined risk, and the place of the part that weighs most in it."""
        known = {i: 1.0 if math.isnan(v) else v for i, v in enumerate(row) if v is not None}
        if not known:
            return None, 0
        if self.rule == "max":
            leader = max(known, key=lambda i: known[i])
            # A failed signal (nan) is a full risk, and stays recognisable as failed.
            return row[leader], leader
        weights = {i: self.parts[i].weight for i in known}
        leader = max(known, key=lambda i: weights[i] * known[i])
        if any(value is not None and math.isnan(value) for value in row):
            return math.nan, leader  # failed: others' low risk must not outvote what is not known
        mean = math.fsum(weights[i] * known[i] for i in known) / math.fsum(weights.values())
        return mean, leader

    def _override(self, batch: MicroBatch, risks: RowRisks) -> None:
        for index, row in enumerate(batch.rows):
            decision = self._overrides.get(row.id)
            if decision is None or row.is_anchor:
                continue
            for values in (risks.values, *risks.by_category.values()):
                values[index] = decision.risk
            risks.sources[index] = "override"
            risks.notes[index] = decision.reason

    # ---- what a step's metrics say of the risk

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of this rank's counts; they are summed over ranks with the step's metrics."""
        names = [name for estimator in self._with("sum_names") for name in estimator.sum_names]
        if self.rule != "single":
            for part in self.parts:
                names += [f"{key}/{part.category}" for key in ("risk_sum", "risk_rows", "risky")]
        return tuple(dict.fromkeys(names))

    def _count(self, batch: MicroBatch, risks: RowRisks) -> None:
        for category, values in risks.by_category.items():
            known = [
                1.0 if math.isnan(value) else value
                for row, value in zip(batch.rows, values, strict=True)
                if value is not None and row.id
            ]
            self._sums[f"risk_sum/{category}"] += math.fsum(known)
            self._sums[f"risk_rows/{category}"] += len(known)
            self._sums[f"risky/{category}"] += sum(v >= COMMON_THRESHOLD for v in known)

    def take_sums(self) -> dict[str, float]:
        """This rank's counts since the last call."""
        sums, self._sums = self._sums, dict.fromkeys(self.sum_names, 0.0)
        for estimator in self._with("take_sums"):
            for name, value in estimator.take_sums().items():
                sums[name] += value
        return sums

    def begin_step(self, step: int) -> None:
        """Tells the signals which optimizer step begins."""
        for estimator in self._with("begin_step"):
            estimator.begin_step(step)

    def end_step(self, total: Mapping[str, float]) -> dict[str, float | int]:
        """Metrics of the step from the counts of all ranks; signals may act on them.

        Empty for a run with one signal that cannot fail. Collectives: those of a probe that is
        being realigned, the same on every rank.
        """
        row: dict[str, float | int] = {}
        for category in (part.category for part in self.parts if self.rule != "single"):
            count = total[f"risk_rows/{category}"]
            row[f"risk_mean/{category}"] = total[f"risk_sum/{category}"] / count if count else 0.0
            row[f"risky_rows/{category}"] = int(total[f"risky/{category}"])
        for estimator in self._with("end_step"):
            row.update(estimator.end_step(total))
        return row

    # ---- work ahead, and what a checkpoint keeps

    @property
    def looks_ahead(self) -> bool:
        """True where a signal can use the rows of coming steps."""
        return bool(self._with("prefetch"))

    def prefetch(self, rows: Iterable[Row]) -> None:
        """Hands rows of coming steps to the signals that work in the background; never waits."""
        if not self.looks_ahead:
            return  # nobody reads them: a whole data set may stand behind the iterator
        rows = list(rows)
        for estimator in self._with("prefetch"):
            estimator.prefetch(rows)

    def save_cache(self, path: Path) -> None:
        """Writes the state of every signal that has one, beside `path`."""
        self._each_cache("save_cache", path)

    def load_cache(self, path: Path) -> None:
        """Restores what `save_cache` wrote.

        Raises:
            CheckpointError: a file is missing, unreadable, or belongs to another signal.
        """
        self._each_cache("load_cache", path)

    def _each_cache(self, method: str, path: Path) -> None:
        for part in self.parts:
            act: Callable[[Path], None] | None = getattr(part.estimator, method, None)
            if act is not None:
                act(path if not part.category else path.with_stem(f"{path.stem}-{part.category}"))

    def _with(self, method: str) -> list[Any]:
        """The signals that have this optional method."""
        return [part.estimator for part in self.parts if hasattr(part.estimator, method)]


def _rescaled(value: float | None, threshold: float) -> float | None:
    return value if value is None or math.isnan(value) else rescale(value, threshold)
