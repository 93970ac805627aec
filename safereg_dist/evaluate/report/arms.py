"""What a report knows of each arm, and how its numbers are written."""

import math
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerFacts:
    """What a ledger says, and whether its chain of hashes holds."""

    rows: int
    sequences: int
    held: int
    """Rows with b > 0, anchors among them."""
    sources: dict[str, int]
    most_held: list[HeldRow]
    """Without anchors."""
    check: str
    holds: bool | None
    """None where the run has not ended: there is no chain yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run, or one model, of a comparison."""

    name: str
    role: str
    """`ours`, `baseline` or `reference`: decides the colour."""
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    """Columns of metrics.jsonl by key, float64 [steps], NaN where a row has no number."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    stale: str = ""
    """Why the evaluation is not of the weights that the run has now; empty where it is."""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    ledger: LedgerFacts | None = None
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`probe.json` of each probe that gave its risk, by folder."""
    profile_png: bytes = b""
    """The figure of a recorded run (`profile: true`); empty where there is none."""

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
