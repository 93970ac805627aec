"""When a step is a reason for an alarm: metrics that leave their band for several steps in a row.

Bands are those of `tracking.alerts`; one that is left open is filled where a baseline is known:

    held_back       of n rows at the share p that was counted before the run, at most what one step
                    in a thousand exceeds by chance: the 99.9 % quantile of Binomial(n, p), over n
    canary_refusal  at least half of what the first look of the run saw
    non_finite      no step at all

An alert is raised once, and again after the number has been inside for a step.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safereg_dist.config import AlertsConfig, Band
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import json_objects

ALERTS_NAME = "alerts.jsonl"
_BY_CHANCE = 0.001  # of the steps of a run as counted; three in a row once in 1e9
_KEPT_OF_CANARY = 0.5

Number = float | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """A number that has left its band."""

    step: int
    """As in `metrics.jsonl`: the last of the steps in a row."""
    name: str
    """The key of `tracking.alerts`."""
    value: float
    limit: float
    is_above: bool
    steps: int
    """Steps in a row."""

    def __str__(self) -> str:
        side = "above" if self.is_above else "below"
        row = f" for {self.steps} in a row" if self.steps > 1 else ""
        return (
            f"alert at step {self.step}: {self.name} {self.value:.4g} is {side} {self.limit:.4g}"
            f"{row} (tracking.alerts.{self.name})"
        )


@dataclass(slots=True)
class _Watched:
    """One number, its band, and how long it has been outside."""

    name: str
    steps: int
    low: float = -math.inf
    high: float = math.inf
    outside: int = 0

    def observe(self, step: int, value: float) -> Alert | None:
        """An alert, in the last of the steps in a row that make one."""
        inside = self.low <= value <= self.high  # nan is not
        self.outside = 0 if inside else self.outside + 1
        if self.outside != self.steps:
            return None
        above = not value < self.low
        limit = self.high if above else self.low
        return Alert(
            step=step, name=self.name, value=value, limit=limit, is_above=above, steps=self.steps
        )


class Alerts:
    """The bands of a run; told of each row of metrics in order, those before a resumption too."""

    def __init__(
        self, config: AlertsConfig, *, rows_per_step: int, held_back: float | None
    ) -> None:
        """`held_back` is the share of rows counted before the run, of all ranks' `rows_per_step`
        in a step; None where nothing was counted."""
        highest = None if held_back is None else most_by_chance(rows_per_step, held_back)
        self._held_back = _watched("held_back", config.held_back, high=highest)
        self._divergence = _watched("divergence", config.divergence)
        self._canary = _watched("canary_refusal", config.canary_refusal)
        self._canary_is_open = config.canary_refusal.min is None
        self._non_finite = _watched("non_finite", config.non_finite)

    def observe(self, row: Mapping[str, Number | None]) -> list[Alert]:
        """The alerts of a step, of its row as in `metrics.jsonl` (null: not finite)."""
        step = int(row["step"] or 0)
        found = [self._non_finite.observe(step, float(not _is_finite(row)))]
        if "risky_fraction" in row:
            found.append(self._held_back.observe(step, _number(row["risky_fraction"])))
        if row.get("active_tokens"):
            found.append(self._divergence.observe(step, _number(row.get("divergence"))))
        if "canary_refusal" in row:
            refusal = _number(row["canary_refusal"])
            if self._canary_is_open and math.isfinite(refusal):
                self._canary_is_open = False
                self._canary.low = _KEPT_OF_CANARY * refusal
            found.append(self._canary.observe(step, refusal))
        return [alert for alert in found if alert is not None]


def _watched(name: str, band: Band, *, high: float | None = None) -> _Watched:
    watched = _Watched(name, band.steps)
    watched.low = -math.inf if band.min is None else band.min
    highest = high if band.max is None else band.max
    watched.high = math.inf if highest is None else highest
    return watched


def most_by_chance(rows: int, share: float) -> float:
    """The share of `rows` that one step in a thousand exceeds where rows are drawn at `share`."""
    from scipy.stats import binom

    return float(binom.ppf(1 - _BY_CHANCE, rows, share)) / rows


def _is_finite(row: Mapping[str, Number | None]) -> bool:
    return all(math.isfinite(_number(row.get(name))) for name in ("loss", "grad_norm"))


def _number(value: Number | None) -> float:
    return math.nan if value is None else float(value)


class AlertFile:
    """`alerts.jsonl` of a run folder: a line for each alert, of the steps that the run has made."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Drops alerts from `first_step` on: those steps are run again.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self._path = folder / ALERTS_NAME
        kept = [each for each in read_alerts(self._path) if each["step"] < first_step]
        self.counts = Counter(str(each["alert"]) for each in kept)
        """Alerts of earlier starts of the run, by name."""
        if self._path.exists():
            write_atomically(self._path, "".join(json.dumps(each) + "\n" for each in kept))

    def write(self, alert: Alert) -> None:
        """Adds its line; errors are OSError."""
        line = {
            "step": alert.step,
            "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "alert": alert.name,
            "value": alert.value if math.isfinite(alert.value) else None,
            "limit": alert.limit,
            "steps": alert.steps,
            "text": str(alert),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_alerts(path: Path) -> list[dict[str, Any]]:
    """The alerts of a file, also while it is written; a line that is none of ours is left out."""
    return [
        each
        for each in json_objects(path)
        if isinstance(each.get("step"), int) and {"alert", "text"} <= each.keys()
    ]
