"""Stage 1: the risk of every row from one source or several, reviewers' decisions included.

single     r = r_1
max        r = max_c s(r_c)                      s maps each source's threshold to 0.5, so that
weighted   r = sum_c w_c s(r_c) / sum_c w_c      sources calibrated apart can be compared
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from safereg_dist.errors import DataError
from safereg_dist.parallel.comm import capture
from safereg_dist.risk.override import Override
from safereg_dist.risk.probe import Probe, rescale
from safereg_dist.types import NAMED_BY_CONTENT, Row, RowRisks, known_risk

COMMON_THRESHOLD = 0.5
"""The threshold of every source after rescaling."""
Risk = list[float | None]
"""[B] risk in [0, 1] of each row, nan where it failed, None on anchor rows and without a source."""


class ProbedStates(NamedTuple):
    """Hidden states of the policy, available when its forward reaches the head."""

    hidden: Tensor
    """[B, S, H] output of the probed decoder layer, detached."""
    row_begins: Sequence[int]
    """Flat index into [B * S] of each row's first token."""


class RiskSource:
    """The risk of a rank's rows, from the rank's own data. The base class gives no risk.

    A subclass overrides `__call__`, and other methods as needed. Every rank calls every method in
    the same order.
    """

    name = "none"
    """The name of the source in the ledger."""
    reads_policy: bool = False
    """True where risk is known only after the policy's forward; the same on all ranks."""
    looks_ahead: bool = False
    """True if the source uses `prefetch`."""
    sum_names: tuple[str, ...] = ()
    """Names of this rank's counts; they are summed over ranks with the step's metrics."""
    notes: Mapping[int, str] = {}
    """Row index of the last call -> note for the ledger; empty for most rows."""
    names_rows: bool = False
    """True where the source knows ids of its own, which rows that came without one are given."""
    ids: Mapping[int, str] = {}
    """Row index of the last call -> the row's id, where `names_rows`."""

    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """Risk of every row; None for each here. Collectives: none.

        `probed` is given if `reads_policy`. `in_first_epoch` is the same on all ranks; once it is
        False, every rank has called the source on each of its rows.
        """
        return [None] * len(rows)

    def prefetch(self, rows: Iterable[Row]) -> None:
        """Starts background work on rows of coming steps; never waits."""

    def begin_step(self, step: int) -> None:
        """An optimizer step begins."""

    def take_sums(self) -> dict[str, float]:
        """This rank's counts (`sum_names`) since the last call."""
        return {}

    def end_step(self, total: Mapping[str, float]) -> dict[str, float | int]:
        """Metrics of the step from the counts of all ranks; the source may act on them."""
        return {}

    def finish(self) -> None:
        """The run has ended; the same on every rank.

        Raises:
            DataError: what was seen means that the run cannot be what was asked for.
        """

    def save_state(self, path: Path) -> None:
        """Writes the source's state, to this file and beside it."""

    def load_state(self, path: Path) -> None:
        """Restores what `save_state` wrote.

        Raises:
            CheckpointError: a file is missing, unreadable, or belongs to another source.
        """

    def load_states(self, paths: Sequence[Path]) -> None:
        """Restores what all ranks of another number wrote; by default what the first did.

        Raises:
            CheckpointError: as `load_state`.
        """
        self.load_state(paths[0])


class ColumnRisk(RiskSource):
    """The `risk` column of the data."""

    name = "column"

    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """The rows' own risk. Collectives: none.

        Raises:
            DataError: a row without one, which would train as if it were harmless.
        """
        for row in rows:
            if row.risk is None and row.id and not row.is_anchor:
                raise DataError(
                    f"row {row.id!r} has no risk: risk.estimator=column needs a column `risk` in "
                    "[0, 1] in the data set (`safereg score` writes one); where a stack drops it, "
                    "set risk.estimator=lookup"
                )
        return [None if row.is_anchor else row.risk for row in rows]


class WeightedSource(NamedTuple):
    """A source of risk with its category, threshold and weight."""

    category: str
    """Its category of harm; empty for the only source of a run."""
    source: RiskSource
    threshold: float
    """The source's threshold, on its own scale."""
    weight: float = 1.0
    probe: Probe | None = None
    """The source's probe, where it is one: it knows the risks of benign calibration rows."""


class RiskStage:
    """Calls every source, combines their risks, and counts them for the metrics."""

    def __init__(
        self,
        sources: Sequence[WeightedSource],
        *,
        rule: str = "single",
        overrides: Mapping[str, Override] | None = None,
    ) -> None:
        """`rule` is `single` (one source), `max` or `weighted`."""
        assert rule != "single" or len(sources) == 1
        self.sources = tuple(sources)
        self.rule = rule
        self._overrides = dict(overrides or {})
        self._names_are_due = any(not n.startswith(NAMED_BY_CONTENT) for n in self._overrides)
        self.last = RowRisks.none(0)
        """What the last call gave."""
        self._sums = dict.fromkeys(self.sum_names, 0.0)

    @property
    def name(self) -> str:
        """A readable name of the source or the combination."""
        if self.rule == "single":
            return self.sources[0].source.name
        return f"{self.rule}({', '.join(self._categories)})"

    @property
    def threshold(self) -> float:
        """Risk from which a row counts as risky, on the scale of the combined risk."""
        return self.sources[0].threshold if self.rule == "single" else COMMON_THRESHOLD

    @property
    def reads_policy(self) -> bool:
        """True where risk is known only after the policy's forward; the same on all ranks."""
        return any(entry.source.reads_policy for entry in self.sources)

    @property
    def positions(self) -> dict[str, str]:
        """Category -> `prompt` or `response`, of the sources that are probes."""
        return {e.category: e.probe.position for e in self.sources if e.probe is not None}

    def benign_share(self, threshold: float) -> float | None:
        """Largest share of benign calibration rows with a risk from half the threshold to it.

        By `max` at most the sum of the sources'. None where a source has no such rows.
        """
        if self.rule != "single" and (self.rule != "max" or threshold != COMMON_THRESHOLD):
            return None
        own = [threshold if self.rule == "single" else entry.threshold for entry in self.sources]
        shares = [
            None if entry.probe is None else entry.probe.benign_share(at / 2, at)
            for entry, at in zip(self.sources, own, strict=True)
        ]
        known = [share for share in shares if share is not None]
        return min(1.0, math.fsum(known)) if len(known) == len(shares) else None

    @property
    def _categories(self) -> list[str]:
        return [entry.category for entry in self.sources]

    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> RowRisks:
        """Risk of every row. Collectives: those of the sources, in their order."""
        # If a source fails here, this rank must still join the collectives of the next source.
        results = [
            capture(entry.source, rows, probed, in_first_epoch=in_first_epoch)
            for entry in self.sources
        ]
        found = [result.value for result in results]
        if self.rule == "single":
            risks = RowRisks(found[0], {}, [self.sources[0].source.name] * len(rows), {}, {})
        else:
            risks = self._combined(found)
        for entry in self.sources:
            risks.notes.update(entry.source.notes)
            risks.ids.update({i: n for i, n in entry.source.ids.items() if not rows[i].has_own_id})
        self._override(rows, risks)
        self._count(rows, risks)
        self.last = risks
        return risks

    def _combined(self, found: list[Risk]) -> RowRisks:
        scaled = [
            [_rescaled(value, entry.threshold) for value in risk]
            for entry, risk in zip(self.sources, found, strict=True)
        ]
        values: Risk = []
        leaders = []
        for row in zip(*scaled, strict=True):
            value, leader = self._combine_row(row)
            values.append(value)
            leaders.append(f"{self.rule}:{self.sources[leader].category}")
        return RowRisks(values, dict(zip(self._categories, scaled, strict=True)), leaders, {}, {})

    def _combine_row(self, row: Sequence[float | None]) -> tuple[float | None, int]:
        """The combined risk, and the index of the source that contributes most to it."""
        known = {i: known_risk(v) for i, v in enumerate(row) if v is not None}
        if not known:
            return None, 0
        if self.rule == "max":
            leader = max(known, key=lambda i: known[i])
            # A failed source (nan) counts as risk 1; the result stays nan, to show the failure.
            return row[leader], leader
        weights = {i: self.sources[i].weight for i in known}
        leader = max(known, key=lambda i: weights[i] * known[i])
        if any(value is not None and math.isnan(value) for value in row):
            return math.nan, leader  # failed: low risks of others must not outweigh it
        mean = math.fsum(weights[i] * known[i] for i in known) / math.fsum(weights.values())
        return mean, leader

    def _override(self, rows: Sequence[Row], risks: RowRisks) -> None:
        self._check_names(rows)
        for index, row in enumerate(rows):
            known = (risks.ids.get(index, row.id), row.id)
            decision = next((self._overrides[n] for n in known if n in self._overrides), None)
            if decision is None or row.is_anchor:
                continue
            for values in (risks.values, *risks.by_category.values()):
                values[index] = decision.risk
            risks.sources[index] = "override"
            risks.notes[index] = decision.reason

    def _check_names(self, rows: Sequence[Row]) -> None:
        """Raises DataError where decisions cannot be for any of the first rows; asked once."""
        training = [row for row in rows if row.id and not row.is_anchor]
        if not self._names_are_due or not training:
            return
        self._names_are_due = False
        names_rows = any(entry.source.names_rows for entry in self.sources)
        if not names_rows and not any(row.has_own_id for row in training):
            raise DataError(
                "risk.override decides by row id, and the rows come without one (the first is "
                f"named after its content, {training[0].id}): keep a column `id`, or, where the "
                "stack drops it, set risk.estimator=lookup with ids in risk.path"
            )

    # ---- metrics of a step

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of this rank's counts; they are summed over ranks with the step's metrics."""
        names = [name for entry in self.sources for name in entry.source.sum_names]
        if self.rule != "single":
            for category in self._categories:
                names += [f"{key}/{category}" for key in ("risk_sum", "risk_rows", "risky")]
        return tuple(dict.fromkeys(names))

    def _count(self, rows: Sequence[Row], risks: RowRisks) -> None:
        for category, values in risks.by_category.items():
            known = [
                known_risk(value)
                for row, value in zip(rows, values, strict=True)
                if value is not None and row.id
            ]
            self._sums[f"risk_sum/{category}"] += math.fsum(known)
            self._sums[f"risk_rows/{category}"] += len(known)
            self._sums[f"risky/{category}"] += sum(v >= COMMON_THRESHOLD for v in known)

    def take_sums(self) -> dict[str, float]:
        """This rank's counts since the last call."""
        sums, self._sums = self._sums, dict.fromkeys(self.sum_names, 0.0)
        for entry in self.sources:
            for name, value in entry.source.take_sums().items():
                sums[name] += value
        return sums

    def begin_step(self, step: int) -> None:
        """Tells the sources which optimizer step begins."""
        for entry in self.sources:
            entry.source.begin_step(step)

    def end_step(self, total: Mapping[str, float]) -> dict[str, float | int]:
        """Metrics of the step from the counts of all ranks; sources may act on them.

        Empty for a run with one source that cannot fail. Collectives: those of a probe that is
        being realigned, the same on every rank.
        """
        row: dict[str, float | int] = {}
        for category in self._categories if self.rule != "single" else ():
            count = total[f"risk_rows/{category}"]
            row[f"risk_mean/{category}"] = total[f"risk_sum/{category}"] / count if count else 0.0
            row[f"risky_rows/{category}"] = int(total[f"risky/{category}"])
        for entry in self.sources:
            row.update(entry.source.end_step(total))
        return row

    def finish(self) -> None:
        """Tells the sources that the run has ended; raises what they raise."""
        for entry in self.sources:
            entry.source.finish()

    # ---- work ahead, and what a checkpoint keeps

    @property
    def looks_ahead(self) -> bool:
        """True where a source can use the rows of coming steps."""
        return any(entry.source.looks_ahead for entry in self.sources)

    def prefetch(self, rows: Iterable[Row]) -> None:
        """Hands rows of coming steps to the sources that work in the background; never waits."""
        if not self.looks_ahead:
            return  # no source reads them: do not iterate over what may be a whole data set
        rows = list(rows)
        for entry in self.sources:
            entry.source.prefetch(rows)

    def save_state(self, path: Path) -> None:
        """Writes the state of every source that has one, beside `path`."""
        for entry in self.sources:
            entry.source.save_state(_file_of(entry, path))

    def load_state(self, path: Path) -> None:
        """Restores what `save_state` wrote.

        Raises:
            CheckpointError: a file is missing, unreadable, or belongs to another source.
        """
        for entry in self.sources:
            entry.source.load_state(_file_of(entry, path))

    def load_states(self, paths: Sequence[Path]) -> None:
        """Restores what all ranks of another number wrote.

        Raises:
            CheckpointError: as `load_state`.
        """
        for entry in self.sources:
            entry.source.load_states([_file_of(entry, path) for path in paths])


def _file_of(entry: WeightedSource, path: Path) -> Path:
    return path if not entry.category else path.with_stem(f"{path.stem}-{entry.category}")


def _rescaled(value: float | None, threshold: float) -> float | None:
    return value if value is None or math.isnan(value) else rescale(value, threshold)
