"""A drift monitor for a probe on the policy: every few steps it also probes the reference.

While a policy trains, its states move away from those that its probe was fitted on. The risk falls,
and with it the protection; AUROC does not show this. So recall at the threshold is measured against
the probe on the reference, on a micro-batch of the step. If it is too low, one of these follows:

    warn       a warning, and the recall in the metrics
    fallback   from then on the probe reads the reference
    realign    the policy's states are mapped back onto the reference's mean and covariance
"""

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.regions import PROBE, region
from safereg_dist.risk.probe import Probe
from safereg_dist.risk.probe_risk import (
    PolicyProbeRisk,
    ReferenceProbeRisk,
    Turns,
    turn_risks,
)
from safereg_dist.risk.realign import Moments, Realignment
from safereg_dist.risk.stage import ProbedStates, Risk, RiskSource
from safereg_dist.types import Row

MIN_FLAGGED = 8
"""Rows that the probe on the reference must flag before the monitor acts on the recall."""


class DriftSettings(Protocol):
    """The keys of `config.RiskConfig` that the monitor reads."""

    @property
    def drift(self) -> str:
        """`warn`, `fallback` or `realign`."""
        ...

    @property
    def drift_every(self) -> int:
        """Optimizer steps between comparisons."""
        ...

    @property
    def drift_recall(self) -> float:
        """Smallest recall accepted."""
        ...


class WatchedPolicyProbe(RiskSource):
    """`PolicyProbeRisk` with a drift monitor; `reference` gives the risks to compare with."""

    sum_names = ("drift_flagged", "drift_found", "drift_rows", "drift_gap")

    def __init__(
        self,
        probe: Probe,
        reference: ReferenceProbeRisk,
        *,
        settings: DriftSettings,
        threshold: float,
        ranks: Ranks,
    ) -> None:
        self._probe = probe
        self._policy = PolicyProbeRisk(probe)
        self._reference = reference
        self._settings = settings
        self._threshold = threshold
        self._ranks = ranks
        self._is_due = self._compares_next = False
        self._sums: dict[str, float] = dict.fromkeys(self.sum_names, 0.0)
        self._checks: deque[tuple[float, float]] = deque()
        self._moments = Moments(probe.mean) if settings.drift == "realign" else None
        self._realignment: Realignment | None = None
        self.has_fallen_back = False
        self._is_low = False
        self._say_who_answers()

    def _say_who_answers(self) -> None:
        """Sets `name` and `reads_policy` by the model that the probe reads now."""
        self.reads_policy = not self.has_fallen_back
        if self.has_fallen_back:
            self.name = self._reference.name
        else:
            self.name = self._policy.name + ("" if self._realignment is None else "-realigned")

    @region(PROBE)
    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """Risk of every row from the policy's states; from the reference's after a fall-back.

        Without policy states (before training) it is the reference's too.
        Collectives: none; in the first micro-batch of a step that compares both models, those of
        `ReferenceProbeRisk` (whose cache `realign` cannot use: it needs states, not risks).
        """
        if probed is None or self.has_fallen_back:
            return self._reference(rows, in_first_epoch=in_first_epoch)
        turns, pooled = self._policy.read(rows, probed)
        mapped = pooled if self._realignment is None else self._realignment(pooled)
        risk = turn_risks(self._probe, len(rows), turns, mapped)
        if self._compares_next:
            self._compares_next = False
            self._compare(risk, self._frozen_risk(rows, turns, pooled))
        return risk

    def _frozen_risk(self, rows: Sequence[Row], turns: Turns, pooled: Tensor) -> Risk:
        if self._moments is None:
            return self._reference(rows, in_first_epoch=True)
        frozen = self._reference.pooled(rows, turns)
        self._moments.add(pooled, frozen)
        return turn_risks(self._probe, len(rows), turns, frozen)

    def _compare(self, own: Risk, frozen: Risk) -> None:
        for a, b in zip(own, frozen, strict=True):
            if a is None or b is None:
                continue
            is_flagged = not b < self._threshold  # nan counts as flagged, on either model
            self._sums["drift_flagged"] += is_flagged
            self._sums["drift_found"] += is_flagged and not a < self._threshold
            self._sums["drift_rows"] += 1
            self._sums["drift_gap"] += abs(a - b) if a == a and b == b else 1.0

    def begin_step(self, step: int) -> None:
        """Decides whether this step compares both models; the same on every rank."""
        self._is_due = not self.has_fallen_back and step % self._settings.drift_every == 0
        self._compares_next = self._is_due

    def take_sums(self) -> dict[str, float]:
        """This rank's counts of the step."""
        sums = dict(self._sums)
        self._sums.update(dict.fromkeys(self.sum_names, 0.0))
        return sums

    def end_step(self, total: Mapping[str, float]) -> dict[str, float | int]:
        """`probe_recall` (of the last checks with enough rows) and `probe_gap` (mean |difference|).

        Acts on them as `drift` says. Empty in a step that did not compare.
        Collectives: with `realign` one SUM of 2 H^2 + 2 H + 1 float32 in a step that compares.
        """
        if not self._is_due:
            return {}
        if self._moments is not None:
            self._realignment = self._moments.realignment(self._ranks)
            self._say_who_answers()
        self._checks.append((total["drift_flagged"], total["drift_found"]))
        while sum(flagged for flagged, _ in list(self._checks)[1:]) >= MIN_FLAGGED:
            self._checks.popleft()  # the newest checks that hold enough rows, and no older ones
        flagged = sum(flagged for flagged, _ in self._checks)
        found = sum(found for _, found in self._checks)
        gap = total["drift_gap"] / max(total["drift_rows"], 1)
        row: dict[str, float | int] = {"probe_gap": gap}
        if flagged:
            row["probe_recall"] = found / flagged
        if flagged >= MIN_FLAGGED:
            was_low, self._is_low = self._is_low, found / flagged < self._settings.drift_recall
            if self._is_low and not was_low:  # warns once, and again only after a recovery
                self._act(found / flagged)
        return row

    def _act(self, recall: float) -> None:
        if self._settings.drift == "fallback":
            self.has_fallen_back = True
            self._say_who_answers()
            remedy = "the reference side gives the risk from now on"
        elif self._settings.drift == "realign":
            remedy = "realigning its states does not hold it; set risk.source=reference"
        else:
            remedy = "protection goes with it; set risk.source=reference, or risk.drift=fallback"
        if self._ranks.is_main:
            print(
                f"safereg: the policy-side probe finds {recall:.0%} of what the reference side "
                f"flags (risk.drift_recall asks for {self._settings.drift_recall:.0%}): {remedy}",
                file=sys.stderr,
                flush=True,
            )

    def save_state(self, path: Path) -> None:
        """Writes the cache of the reference's risks and, beside it, the monitor's state."""
        self._reference.save_state(path)
        tensors = {
            "has_fallen_back": torch.tensor([self.has_fallen_back]),
            "checks": torch.tensor(list(self._checks), dtype=torch.float64).reshape(-1, 2),
        }
        if self._moments is not None:
            tensors.update(self._moments.state())
        save_file(tensors, path.with_stem(f"{path.stem}-drift"))

    def load_state(self, path: Path) -> None:
        """Restores what `save_state` wrote.

        Raises:
            CheckpointError: a file is missing or unreadable, or belongs to another probe.
        """
        self._reference.load_state(path)
        own = path.with_stem(f"{path.stem}-drift")
        try:
            tensors = load_file(own)
            self.has_fallen_back = bool(tensors["has_fallen_back"].item())
            self._checks = deque((a, b) for a, b in tensors["checks"].tolist())
            if self._moments is not None:
                self._moments.load_state(tensors)
                self._realignment = self._moments.map()
        except (OSError, SafetensorError, KeyError) as err:
            raise CheckpointError(
                f"what the drift monitor knew cannot be read from {own} ({err}): remove this "
                "checkpoint to resume from an earlier one"
            ) from err
        self._say_who_answers()

    def load_states(self, paths: Sequence[Path]) -> None:
        """Restores the caches of all these ranks; the monitor's state is the same on each.

        Raises:
            CheckpointError: as `load_state`.
        """
        self.load_state(paths[0])
        self._reference.load_states(paths)
