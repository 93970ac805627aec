"""A self-supervised probe beside a supervised one, where the data has labels to judge both by."""

from dataclasses import replace

import numpy as np

from safereg_dist.errors import DataError, ProbeError
from safereg_dist.probe_lab.job import Collected
from safereg_dist.probe_lab.layer_fit import LayerFit, Recipe, fit_layer
from safereg_dist.probe_lab.scores import auroc
from safereg_dist.probe_lab.split import check_enough


def compare_with_labels(collected: Collected, fit: LayerFit) -> dict[str, float] | None:
    """How a probe fitted on the model's behaviour compares with one fitted on labels.

    Both are on the same layer, split and hold-out: AUROC of both against the labels, the share of
    rows where both decide alike, and where behaviour and label do. None where the file has no
    labels, or too few to fit on; the labels are used for nothing else.
    """
    sources = collected.sources
    if not sources.has_labels:
        return None
    labels = np.zeros_like(collected.rows.harmful)
    labels[: len(sources.examples)] = [e.label == "harmful" for e in sources.examples]
    rows = replace(collected.rows, harmful=labels)
    options, report = sources.options, fit.report
    try:
        check_enough(rows, options.recall, options.held_out_fraction)
    except (DataError, ProbeError):
        return None
    states = collected.store.layer(report.pooling, report.layer)
    recipe = Recipe(pooling=report.pooling, recall=options.recall, seed=options.seed)
    supervised = fit_layer(states, rows, report.layer, recipe, device=collected.device)
    held = rows.where("hold_out") & ~rows.background
    flagged = [f.probability[held] >= f.probe.threshold for f in (fit, supervised)]
    return {
        "auroc_self_supervised": auroc(fit.probability[held], labels[held]),
        "auroc_supervised": auroc(supervised.probability[held], labels[held]),
        "agreement": float(np.mean(flagged[0] == flagged[1])),
        "behaviour_agrees_with_labels": float(
            np.mean(collected.rows.harmful[held] == labels[held])
        ),
    }
