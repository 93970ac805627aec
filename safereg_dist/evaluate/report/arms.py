"""What a report knows of each arm, and how its numbers are written."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DASH = "\u2013"
"""In the place of a number that is not known."""


def number(value: Any) -> float:
    """The value as a float; NaN where it is no number, or beyond those that a float has."""
    try:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number else float("nan")
    except OverflowError:
        return float("nan")


def percent(value: float) -> str:
    """`12.3 %`, without a needless decimal; two digits of small ones; a dash where it is NaN."""
    if not np.isfinite(value):
        return DASH
    if 0 < abs(value) < 0.1:
        return f"{value:.1e}\u00a0%" if abs(value) < 0.001 else f"{value:.2g}\u00a0%"
    return f"{value:.1f}".removesuffix(".0") + "\u00a0%"


def plain(value: float, form: str = "") -> str:
    """The number in that form, else with three digits or more; a dash where it is NaN."""
    form = form or (",.0f" if abs(value) >= 1000 else ".3g")
    return format(value, form) if math.isfinite(value) else DASH


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one in the place of anything else."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldRow:
    """A training row that was held back (b > 0), over all steps that trained it."""

    name: str
    times: int
    """Steps in which b > 0."""
    seen: int
    """Steps that trained it."""
    mean_risk: float
    highest_risk: float
    mean_coefficient: float
    """Over the steps in which b > 0, as is the mean divergence."""
    mean_divergence: float


class Tally(NamedTuple):
    """Sequences of one group, a data source or a category, and how many of them were held back."""

    name: str
    sequences: int
    held: int
    mean_risk: float
    """NaN where none is known."""


class Check(NamedTuple):
    """Whether a ledger's chain of hashes holds, and what vouches for it."""

    state: str
    """`verified`, `altered` or `unchecked`."""
    told: str
    is_signed: bool = False
    """The summary, with the head in it, carries a signature that was checked with a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerFacts:
    """What a ledger says, and whether its chain of hashes holds; anchors count in `rows` alone.

    Held back is a sequence whose risk reached the run's threshold, or failed, in some step.
    """

    rows: int
    """One for each sequence and step."""
    sequences: int
    """Different ones, without anchors."""
    held: int
    """Of these, held back."""
    has_risk: bool
    """False where nothing gave a risk: plain fine-tuning."""
    by: dict[str, list[Tally]]
    """`source` of the data, `estimator`, `category`, `review` (a reviewer's decision)."""
    failed: int
    """Sequences with a judgement that failed at least once."""
    reasons: list[tuple[str, int]]
    """What held sequences back, without texts of the data or of reviewers; most frequent first."""
    most_held: list[HeldRow]
    check: Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run, or one model, of a comparison."""

    name: str
    role: str
    """`ours`, `baseline` or `reference`: decides the colour."""
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    """Columns of metrics.jsonl by key, float64 [steps], NaN where a row has no number; `step`
    counts from 1, so that the last one is their number."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    stale: str = ""
    """Why the evaluation is not of the weights that the run has now; empty where it is."""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    ledger: LedgerFacts | None = None
    profile: dict[str, Any] = field(default_factory=dict)
    """`profile.json` of a recorded run (`profile: true`)."""
    alerts: dict[str, int] = field(default_factory=dict)
    """How often each alert was raised."""
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`probe.json` of each probe that gave its risk, by folder."""
    profile_png: bytes = b""
    """The figure of a recorded run (`profile: true`); empty where there is none."""
    folder: Path | None = None
    """Where it was read, resolved."""

    def rate(self, key: str) -> float:
        """A figure of the evaluation in per cent; NaN where there is none."""
        return 100.0 * number(self.evaluation.get(key))

    def bounds(self, key: str) -> tuple[float, float] | None:
        """Its 95 % interval in per cent; None where there is none."""
        found = as_object(self.evaluation.get("intervals")).get(key)
        if not isinstance(found, (list, tuple)) or len(found) != 2:
            return None
        low, high = (100.0 * number(bound) for bound in found)
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None

    def setting(self, section: str, key: str) -> Any:
        """A key of the run's configuration; None where it is not known."""
        return as_object(self.config.get(section)).get(key)

    def compared(self, base: "Arm | None") -> dict[str, Any]:
        """By figure, its paired test against the base model; empty where there is none.

        Without a base among the arms, the only other model that it was compared with.
        """
        others = as_object(self.evaluation.get("against"))
        name = base.name if base is not None else next(iter(others), "")
        found = others.get(name) if base is not None or len(others) == 1 else None
        return as_object(as_object(found).get("differences"))

    @property
    def static_coefficient(self) -> float:
        """The b of every row, where it is one and D is KL(ref||policy); NaN elsewhere.

        The base model is b = 1, fine-tuning without a regulariser b = 0.
        """
        objective = self.setting("regularizer", "objective")
        if self.role == "reference":
            return 1.0
        if self.setting("data", "anchor") is not None:
            return math.nan  # their b is another one
        if objective == "none":
            return 0.0
        if objective == "static" and self.setting("regularizer", "divergence") == "kl_forward":
            return number(self.setting("regularizer", "ceiling"))
        return math.nan

    def column(self, key: str) -> np.ndarray:
        """A column of the metrics, [steps]; all NaN where the key is absent."""
        return self.metrics.get(key, np.full(len(self.metrics.get("step", ())), np.nan))

    def total(self, key: str) -> float:
        """Sum of a column over all steps that have it; NaN where no step has."""
        values = self.column(key)
        return float(np.nansum(values)) if np.isfinite(values).any() else math.nan

    def share(self, part: str, whole: str) -> float:
        """total(part) / total(whole) in per cent, NaN where unknown."""
        of = self.total(whole)
        return 100.0 * self.total(part) / of if of > 0 else math.nan

    def median(self, key: str) -> float:
        """Median of a column; NaN where there is none."""
        values = self.column(key)
        values = values[np.isfinite(values)]
        return float(np.median(values)) if values.size else math.nan

    def largest(self, key: str) -> float:
        """Maximum of a column; NaN where there is none."""
        values = self.column(key)
        return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan

    def ending(self, key: str) -> float:
        """Mean of a column over the last tenth of the steps; NaN where there is none."""
        values = self.column(key)
        values = values[np.isfinite(values)]
        return float(values[-max(1, len(values) // 10) :].mean()) if values.size else math.nan


def ours_and_rival(arms: list[Arm], key: str) -> tuple[Arm | None, Arm | None]:
    """The first risk-adaptive arm that has `key`, and the first baseline that has it."""
    known = [
        arm for arm in arms if np.isfinite(arm.rate(key)) or np.isfinite(arm.column(key)).any()
    ]
    ours = next((arm for arm in known if arm.role == "ours"), None)
    rival = next((arm for arm in known if arm.role == "baseline"), None)
    return ours, rival


def base_of(arms: list[Arm]) -> Arm | None:
    """The model before training: the first reference among the arms."""
    return next((arm for arm in arms if arm.role == "reference"), None)
