"""One probe on one layer: fitted, calibrated, given a threshold, and measured on the hold-out."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safereg_dist.probe_lab.calibration import fit_isotonic, fit_temperature
from safereg_dist.probe_lab.classifiers import CrossValidated, cross_validated, fit_weights
from safereg_dist.probe_lab.scores import bootstrap, flagged_fraction, interval, measure, spread
from safereg_dist.probe_lab.split import SplitRows
from safereg_dist.probe_lab.threshold import recall_threshold
from safereg_dist.risk.probe import Probe

_CHOICE_DRAWS, _INTERVAL_DRAWS = 200, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """The figures of one probe on rows that it was not fitted on.

    Figures are over real prompts of the hold-out; that named `background` over background rows, and
    those named `choice` over the fit part out-of-fold. So the choice of the layer does not use the
    calibration rows, and the threshold's guarantee holds for any number of layers tried.
    """

    layer: int
    kind: str
    pooling: str
    l2: float
    """Penalty chosen by cross-validation; 0 for a direction, which has none."""
    threshold: float
    conformal_threshold: float
    choice_auroc: float
    choice_auroc_error: float
    choice_log_loss: float
    choice_log_loss_error: float
    temperature: float
    """1 if the calibration uses knots."""
    recall: float
    """Measured at the threshold."""
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
    """Figure over real prompts of the hold-out -> its 95 % bootstrap interval."""


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
    """A probe, still without its model's fingerprint, and its report."""

    report: LayerReport
    probe: Probe
    probability: np.ndarray
    """[rows] float64 probabilities of all rows, computed by the stored probe."""


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
    calibrate = torch.from_numpy(rows.where("calibrate"))
    raw, seen = _fitted(states, rows, layer, recipe, device)
    temperature, probe = _calibrated(
        raw,
        states[calibrate],
        torch.from_numpy(rows.harmful)[calibrate].double(),
        recipe.calibration,
    )
    # The threshold is set on the stored float32 probe's output, so rounding cannot lose a row.
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
        l2=seen.penalty,
        temperature=temperature,
        threshold=probe.threshold,
        conformal_threshold=conformal,
        **_choice_figures(seen.logits, rows, recipe.seed),
        **_held_out_figures(probability, rows, probe.threshold, recipe.seed),
    )
    return LayerFit(report=report, probe=probe, probability=probability)


def _fitted(
    states: Tensor, rows: SplitRows, layer: int, recipe: Recipe, device: torch.device | None
) -> tuple[Probe, CrossValidated]:
    """(probe before calibration, what cross-validation found), from the fit part alone."""
    fit = torch.from_numpy(rows.where("fit"))
    mean, scale = _standardisation(states[fit])
    features = ((states[fit].double() - mean) / scale).to(device)
    labels = torch.from_numpy(rows.harmful)[fit].double().to(device)
    fold = torch.from_numpy(rows.fold)[fit].to(device)
    seen = cross_validated(recipe.kind, features, labels, fold, recipe.seed)
    weights = fit_weights(recipe.kind, features, labels, seen.penalty, recipe.seed)
    tensors = {name: t.float().cpu() for name, t in weights._asdict().items() if t is not None}
    bias = float(tensors.pop("bias"))
    probe = Probe(
        layer=layer,
        pooling=recipe.pooling,
        position=recipe.position,
        kind=recipe.kind,
        mean=mean.float(),
        scale=scale.float(),
        weight=tensors.pop("weight"),
        bias=bias,
        threshold=0.5,
        fingerprint="",
    )
    return replace(probe, **tensors), seen


def _standardisation(states: Tensor) -> tuple[Tensor, Tensor]:
    states = states.double()
    # The floor avoids a division by zero for a constant feature, which carries no information.
    return states.mean(0), states.std(0).clamp_min(1e-6)


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


def _choice_figures(logits: Tensor, rows: SplitRows, seed: int) -> dict[str, float]:
    """The figures for choosing the layer: AUROC on real prompts, log loss with background rows."""
    fit = rows.where("fit")
    labels, group, real = rows.harmful[fit], rows.group[fit], ~rows.background[fit]
    logits = logits.cpu()
    temperature = fit_temperature(logits, torch.from_numpy(labels).double())
    probability = torch.sigmoid(logits / temperature).numpy()
    found = {}
    for name, chosen in (("auroc", real), ("log_loss", np.ones_like(real))):
        given = probability[chosen], labels[chosen]
        drawn = bootstrap(*given, group[chosen], threshold=0.5, draws=_CHOICE_DRAWS, seed=seed)
        found[f"choice_{name}"] = float(measure(*given, threshold=0.5)[name][0])
        found[f"choice_{name}_error"] = spread(drawn[name])
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
