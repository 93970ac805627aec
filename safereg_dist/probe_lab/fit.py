"""`safereg probe fit`: a probe per layer and kind, the earliest good one, its threshold."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safereg_dist.probe_lab.comparison import compare_with_labels
from safereg_dist.probe_lab.control import auroc_of_pairs, bag_of_words
from safereg_dist.probe_lab.figures import draw_reliability, draw_roc, draw_sweep
from safereg_dist.probe_lab.job import Collected, alone, collect
from safereg_dist.probe_lab.layer_fit import LayerFit, LayerReport, Recipe, fit_layer
from safereg_dist.probe_lab.options import LabOptions
from safereg_dist.probe_lab.tables import (
    print_chosen,
    print_comparison,
    print_control,
    print_sweep,
)
from safereg_dist.risk.probe import Probe
from safereg_dist.screen.progress import progress_bar
from safereg_dist.storage.json_text import json_ready


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """A fitted probe and the sweep it came from."""

    probe: Probe
    layers: list[LayerReport]
    """One for each layer and kind."""
    chosen: LayerReport


_MOST_KEPT = 1000  # risks of benign calibration rows: their tail to a tenth of a per cent
WORTH_A_GPU = 1 << 25
"""Elements of pooled states from which they are fitted on the GPU: 4096 rows of 8192. L-BFGS waits
for each of its thousands of small products: 2010 rows of 576 took 60 s a layer on an H200, 10 s on
one core of a CPU. Where the two meet was not measured."""


def fit_probe(model_dir: Path, data_file: Path, out_dir: Path, **options: Any) -> FitReport:
    """Fits, calibrates and saves one probe in this process; prints one line per layer.

    Args:
        options: the fields of `LabOptions`.
    Raises:
        ConfigError, DataError, ProbeError: no such layer, labels of one class only, too few rows.
    """
    chosen = LabOptions(**options)
    ranks = alone(chosen.device)
    (collected,) = collect(model_dir, data_file, out_dir, (chosen.position,), chosen, ranks=ranks)
    return fit_collected(collected)


def fit_collected(collected: Collected) -> FitReport:
    """The probe of one position, saved to `collected.out` with its figures, and printed.

    Rows were split into fit, calibration and hold-out, near-duplicate prompts together. Penalty and
    layer are chosen by cross-validation inside the fit part; probabilities are calibrated and the
    threshold set on the calibration part; figures come from the hold-out.

    Raises:
        ProbeError: the folder cannot be written.
    """
    options = collected.sources.options
    fits = fit_all(collected, (options.chosen_pooling,))
    reports = [fit.report for fit in fits]
    chosen = choose(reports)
    fit = fits[reports.index(chosen)]
    facts = collected.facts()
    if options.self_supervised:
        facts["comparison"] = compare_with_labels(collected, fit)
    else:
        given = collected.sources.examples, collected.rows
        facts["control"] = bag_of_words(*given, position=options.position, seed=options.seed)
        facts["pairs_auroc"] = auroc_of_pairs(*given, fit.probability)
        words = facts["control"].pop("pairs_words")  # no text of the data goes into the file
    facts |= {"metrics": asdict(chosen), "guarantee": _guarantee(facts, options)}
    facts["layers"] = [asdict(report) for report in reports]
    facts["benign_risks"] = _benign_risks(collected, fit)
    probe = replace(
        fit.probe,
        fingerprint=collected.store.manifest.fingerprint,
        meta=json_ready(facts),
    )
    probe.save(collected.out)
    _draw(collected, fit, reports)
    print_sweep(reports, chosen)
    print(why(reports, chosen))
    print_chosen(probe)
    if options.self_supervised:
        print_comparison(facts["comparison"])
    else:
        told = asdict(chosen) | {"pairs_auroc": facts["pairs_auroc"]}
        print_control(facts["control"] | {"pairs_words": words}, told)
    collected.clean_up()
    return FitReport(probe=probe, layers=reports, chosen=chosen)


def fit_all(collected: Collected, poolings: Sequence[str]) -> list[LayerFit]:
    """A probe for each pooling, layer and kind, in this order."""
    options = collected.sources.options
    pairs = [(pooling, layer) for pooling in poolings for layer in collected.sources.layers]
    fits = []
    for pooling, layer in progress_bar(pairs, desc="fit layers", shown=options.progress):
        states = collected.store.layer(pooling, layer)
        for kind in options.chosen_kinds:
            recipe = Recipe(
                pooling=pooling,
                position=options.position,
                kind=kind,
                calibration=options.calibration,
                recall=options.recall,
                seed=options.seed,
            )
            device = collected.device if states.numel() >= WORTH_A_GPU else torch.device("cpu")
            fits.append(fit_layer(states, collected.rows, layer, recipe, device=device))
    return fits


def choose(reports: Sequence[LayerReport]) -> LayerReport:
    """The earliest layer within one bootstrap error of the best: early layers cost less to run.

    First by AUROC over real prompts, then by log loss over background rows too, both out-of-fold in
    the fit part, so that calibration and hold-out stay untouched by the choice. Of the kinds on one
    layer, the first that was asked for.
    """
    best = max(reports, key=lambda r: r.choice_auroc)
    bar = best.choice_auroc - best.choice_auroc_error
    good = [r for r in reports if r.choice_auroc >= bar]
    best = min(good, key=lambda r: r.choice_log_loss)
    bar = best.choice_log_loss + best.choice_log_loss_error
    return next(r for r in good if r.choice_log_loss <= bar)


def why(reports: Sequence[LayerReport], chosen: LayerReport) -> str:
    """One line: what was chosen by `choose`, and against which best of all."""
    best = max(reports, key=lambda r: r.choice_auroc)
    said = (
        f"layer {chosen.layer}, {chosen.kind}, {chosen.pooling}: out-of-fold in the fit part, "
        f"AUROC {chosen.choice_auroc:.3f}"
    )
    if chosen is best:
        return f"{said}, the best of {len(reports)}"
    return (
        f"{said}: the earliest within one error of the best of {len(reports)}, in AUROC (layer "
        f"{best.layer}, {best.kind}, {best.pooling}: {best.choice_auroc:.3f}, error "
        f"{best.choice_auroc_error:.3f}) and in log loss"
    )


def _benign_risks(collected: Collected, fit: LayerFit) -> list[float]:
    """The risks of the benign calibration prompts, ascending: what honest rows look like.

    Without background rows, which are no requests; of many, a thousand evenly by rank.
    """
    rows = collected.rows
    benign = rows.where("calibrate") & ~rows.harmful
    real = benign & ~rows.background
    risks = np.sort(fit.probability[real if real.any() else benign])
    at = np.linspace(0, len(risks) - 1, min(len(risks), _MOST_KEPT)).round().astype(int)
    return [round(float(risk), 6) for risk in risks[at]]


def _draw(collected: Collected, fit: LayerFit, reports: Sequence[LayerReport]) -> None:
    held = collected.rows.where("hold_out") & ~collected.rows.background
    probability, labels = fit.probability[held], collected.rows.harmful[held]
    draw_sweep(reports, fit.report, collected.out / "probe.png")
    draw_roc(probability, labels, fit.probe.threshold, collected.out / "roc.png")
    draw_reliability(probability, labels, collected.out / "reliability.png")


def _guarantee(facts: dict[str, Any], options: LabOptions) -> dict[str, Any]:
    refused = "prompt that the model refuses"
    return {
        "of": refused if options.self_supervised else f"harmful {options.position}",
        "level": facts["required_recall"],
        "calibration_positives": facts["calibration_positives"],
        "method": "split conformal",
        "holds_for": "rows like the calibration rows; not under attack or shift",
    }
