"""One probe on one layer: fitted, calibrated, given a threshold, and measured on the hold-out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safereg_dist.probe_lab.calibration import fit_isotonic, fit_temperature
from safereg_dist.probe_lab.logistic import L2_GRID, cross_validated, fit_logistic
from safereg_dist.probe_lab.mlp import PENALTY_GRID, Mlp, fit_mlp
from safereg_dist.probe_lab.scores import bootstrap, flagged_fraction, interval, measure, spread
from safereg_dist.probe_lab.split import SplitRows
from safereg_dist.probe_lab.threshold import recall_threshold
from safereg_dist.risk.probe import Probe

_CHOICE_DRAWS, _INTERVAL_DRAWS = 200, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What one probe does on rows that took no part in its fit.

    Figures are over real prompts of the hold-out; those named `background` over background rows,
    those named `calibration` over the calibration part.
    """

    layer: int
    kind: str
    pooling: str
    l2: float
    """Penalty chosen by cross-validation; 0 for a direction, which has none."""
    threshold: float
    conformal_threshold: float
    calibration_auroc: float
    calibration_auroc_error: float
    calibration_log_loss: float
    calibration_log_loss_error: float
    temperature: float
    """1 where knots calibrate."""
    recall: float
    """At the threshold."""
    false_positive_rate: float
    background_false_positive_rate: float
    auroc: float
    average_precision: float
    recall_at_fpr_1: float
    recall_at_fpr_5: float
    brier: float
    log_loss: float
    calibration_error: float
    intervals: dict[str, tuple[float, float]]
    """By figure over real prompts of the hold-out: its 95 % bootstrap interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the probes of a sweep are made."""

    pooling: str
    position: str = "prompt"
    kind: str = "linear"
    calibration: str = "temperature"
    recall: float = 0.95
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFit:
    """A probe, still without its model's fingerprint, and what it does."""

    report: LayerReport
    probe: Probe
    probability: np.ndarray
    """[rows] float64, of all rows, as the stored probe gives it."""


def fit_layer(
    states: Tensor,
    rows: SplitRows,
    layer: int,
    recipe: Recipe,
    *,
    device: torch.device | None = None,
) -> LayerFit:
    """The probe on one layer's pooled states [rows, H].

    Args:
        device: where the fit runs; the states' own by default.
    """
    fit, calibrate = (torch.from_numpy(rows.where(part)) for part in ("fit", "calibrate"))
    labels = torch.from_numpy(rows.harmful).double()
    mean, scale = _standardisation(states[fit])
    features = ((states[fit].double() - mean) / scale).to(device)
    l2, weights = _FITTERS[recipe.kind](
        features, labels[fit].to(device), torch.from_numpy(rows.fold)[fit].to(device), recipe.seed
    )
    raw = Probe(
        layer=layer,
        pooling=recipe.pooling,
        position=recipe.position,
        kind=recipe.kind,
        mean=mean.float(),
        scale=scale.float(),
        threshold=0.5,
        fingerprint="",
        weight=weights["weight"].float().cpu(),
        bias=float(weights["bias"]),
    )
    if "hidden_weight" in weights:
        hidden = {name: weights[name].cpu() for name in ("hidden_weight", "hidden_bias")}
        raw = replace(raw, **hidden)
    temperature, probe = _calibrated(raw, states[calibrate], labels[calibrate], recipe.calibration)
    # Calibrated on what the stored float32 probe says, so that rounding cannot cost a row.
    probability = probe.probability(states).double().numpy()
    threshold, conformal = recall_threshold(
        probability[rows.calibration_positives],
        probability[rows.where("calibrate") & ~rows.harmful],
        recipe.recall,
    )
    probe = replace(probe, threshold=min(threshold, conformal))
    report = LayerReport(
        layer=layer,
        kind=recipe.kind,
        pooling=recipe.pooling,
        l2=l2,
        temperature=temperature,
        threshold=probe.threshold,
        conformal_threshold=conformal,
        **_choice_figures(probability, rows, recipe.seed),
        **_held_out_figures(probability, rows, probe.threshold, recipe.seed),
    )
    return LayerFit(report=report, probe=probe, probability=probability)


def _standardisation(states: Tensor) -> tuple[Tensor, Tensor]:
    states = states.double()
    # A feature that never moves says nothing; without the floor it would divide by zero.
    return states.mean(0), states.std(0).clamp_min(1e-6)


Weights = dict[str, Tensor]


def _linear(features: Tensor, labels: Tensor, fold: Tensor, seed: int) -> tuple[float, Weights]:
    l2 = cross_validated(
        L2_GRID, fit_logistic, lambda wb, x: x @ wb[0] + wb[1], features, labels, fold
    )
    weight, bias = fit_logistic(features, labels, l2)
    return l2, {"weight": weight, "bias": bias}


def _mlp(features: Tensor, labels: Tensor, fold: Tensor, seed: int) -> tuple[float, Weights]:
    fit = partial(fit_mlp, seed=seed)
    l2 = cross_validated(PENALTY_GRID, fit, Mlp.logits, features, labels.float(), fold)
    return l2, fit(features, labels, l2)._asdict()


def _direction(features: Tensor, labels: Tensor, fold: Tensor, seed: int) -> tuple[float, Weights]:
    """Unit difference of the class means; logit 0 lies half-way between them."""
    harmful, benign = (features[labels == value].mean(0) for value in (1, 0))
    weight = torch.nn.functional.normalize(harmful - benign, dim=0)
    return 0.0, {"weight": weight, "bias": -weight @ (harmful + benign) / 2}


_FITTERS: dict[str, Callable[[Tensor, Tensor, Tensor, int], tuple[float, Weights]]] = {
    "linear": _linear,
    "mlp": _mlp,
    "direction": _direction,
}


def _calibrated(
    probe: Probe, states: Tensor, labels: Tensor, calibration: str
) -> tuple[float, Probe]:
    """(temperature, calibrated probe); the temperature goes into the weights."""
    logits = probe.logit(states).double()
    if calibration == "isotonic":
        x, y = fit_isotonic(logits, labels)
        return 1.0, replace(probe, knots_x=x, knots_y=y)
    temperature = fit_temperature(logits, labels)
    return temperature, replace(
        probe, weight=probe.weight / temperature, bias=probe.bias / temperature
    )


def _choice_figures(probability: np.ndarray, rows: SplitRows, seed: int) -> dict[str, float]:
    """What the layer is chosen by: ranking over real prompts, log loss over background too."""
    found = {}
    part = rows.where("calibrate")
    for name, chosen in (("auroc", part & ~rows.background), ("log_loss", part)):
        p, labels = probability[chosen], rows.harmful[chosen]
        drawn = bootstrap(
            p, labels, rows.group[chosen], threshold=0.5, draws=_CHOICE_DRAWS, seed=seed
        )
        found[f"calibration_{name}"] = float(measure(p, labels, threshold=0.5)[name][0])
        found[f"calibration_{name}_error"] = spread(drawn[name])
    return found


def _held_out_figures(
    probability: np.ndarray, rows: SplitRows, threshold: float, seed: int
) -> dict[str, Any]:
    held = rows.where("hold_out")
    real = held & ~rows.background
    found = figures_with_intervals(
        probability[real], rows.harmful[real], rows.group[real], threshold=threshold, seed=seed
    )
    background = flagged_fraction(probability[held & rows.background], threshold)
    return {**found, "background_false_positive_rate": background}


def figures_with_intervals(
    probability: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    threshold: float,
    seed: int,
) -> dict[str, Any]:
    """The figures of `scores.measure`, and their 95 % intervals under `intervals`."""
    found = measure(probability, labels, threshold=threshold)
    drawn = bootstrap(
        probability, labels, groups, threshold=threshold, draws=_INTERVAL_DRAWS, seed=seed
    )
    return {
        **{name: float(values[0]) for name, values in found.items()},
        "intervals": {name: interval(values) for name, values in drawn.items()},
    }
