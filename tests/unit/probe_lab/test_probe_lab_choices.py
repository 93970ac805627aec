"""Claimed: the laboratory chooses penalty, temperature, threshold and layer as it says it does.

Exact: counts of calibration rows below the threshold, which layer and penalty are chosen. Rounds:
the temperature's grid (5 %).
"""

import numpy as np
import pytest
import torch

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.probe_lab.calibration import fit_temperature
from safereg_dist.probe_lab.classifiers import cross_validated, fit_weights
from safereg_dist.probe_lab.fit import choose, why
from safereg_dist.probe_lab.layer_fit import LayerReport, Recipe, fit_layer
from safereg_dist.probe_lab.logistic import L2_GRID
from safereg_dist.probe_lab.split import split_rows


def test_temperature_mends_overconfidence_and_never_claims_certainty():
    draw = np.random.default_rng(1)
    logits = torch.from_numpy(draw.normal(0, 2, 4000))
    labels = torch.from_numpy((draw.random(4000) < torch.sigmoid(logits).numpy()).astype(float))
    assert fit_temperature(logits * 5, labels) == pytest.approx(5, rel=0.1)
    assert fit_temperature(logits / 5, labels) == pytest.approx(0.2, rel=0.1)
    separated = torch.tensor([40.0] * 30 + [-40.0] * 30, dtype=torch.float64)
    temperature = fit_temperature(separated, (separated > 0).double())
    # 30 rows without a mistake say 31/32, not 1.
    assert float(torch.sigmoid(separated[0] / temperature)) == pytest.approx(31 / 32, abs=0.01)


def test_penalties_that_tie_give_the_strongest():
    nothing, labels = torch.zeros(12, 2).double(), torch.tensor([0.0, 1.0] * 6).double()
    found = cross_validated("linear", nothing, labels, torch.arange(12) % 3, 0)
    assert found.penalty == max(L2_GRID)


@pytest.mark.parametrize("kind", ["linear", "mlp", "direction"])
def test_cross_validation_speaks_of_rows_that_it_has_not_seen(kind):
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(90, 3, generator=draw, dtype=torch.float64)
    labels = (features[:, 0] + 0.3 * features[:, 1] > 0).double()
    fold = torch.arange(90) % 3
    found = cross_validated(kind, features, labels, fold, 0)
    for held in range(3):
        inside, outside = fold != held, fold == held
        alone = fit_weights(kind, features[inside], labels[inside], found.penalty, 0)
        assert torch.equal(found.logits[outside], alone.logits(features[outside]))
    assert ((found.logits > 0) == (labels > 0.5)).double().mean() > 0.85


def test_the_threshold_holds_for_the_stored_probe():
    """Whatever the rounding, exactly rank - 1 calibration positives lie below it."""
    labelled = [
        LabelledPrompt(
            id=str(i),
            messages=[{"role": "user", "content": f"text {i}"}],
            label="harmful" if i < 150 else "benign",
            response=None,
        )
        for i in range(300)
    ]
    rows = split_rows(labelled, [], 0.2, 0)
    for seed in range(5):
        states = torch.randn(300, 8, generator=torch.Generator().manual_seed(seed))
        states[:, 0] += torch.from_numpy(rows.harmful) * 1.0  # overlapping classes
        fitted = fit_layer(states, rows, 1, Recipe(pooling="mean_prompt", recall=0.9))
        report, probe = fitted.report, fitted.probe
        below = probe.probability(states).double().numpy() < probe.threshold
        assert below[rows.calibration_positives].sum() == 2  # floor(31 * 0.1) - 1
        assert probe.threshold == report.threshold == report.conformal_threshold


@pytest.mark.parametrize(
    ("areas", "losses", "chosen"),
    [
        ((0.7, 0.99, 0.995), (0.1, 0.1, 0.1), 2),
        ((0.995, 0.99, 0.99), (0.1, 0.1, 0.1), 1),
        ((1.0, 1.0, 1.0), (0.3, 0.105, 0.1), 2),
        ((0.7, 0.99, 0.995), (0.01, 0.3, 0.1), 3),  # a low loss does not mend a poor ranking
    ],
)
def test_the_earliest_of_the_good_layers(areas, losses, chosen):
    zeros = dict.fromkeys(LayerReport.__dataclass_fields__, 0.0)
    errors = {"choice_auroc_error": 0.01, "choice_log_loss_error": 0.01}
    reports = []
    for layer, (area, loss) in enumerate(zip(areas, losses, strict=True), start=1):
        measured = {"layer": layer, "choice_auroc": area, "choice_log_loss": loss}
        reports.append(LayerReport(**{**zeros, **errors, **measured}))
    found = choose(reports)
    assert found.layer == chosen
    best = areas.index(max(areas)) + 1
    said = why(reports, found)
    assert said.startswith(f"layer {chosen}, ")
    assert f"AUROC {areas[chosen - 1]:.3f}" in said
    if chosen == best:
        assert said.endswith("the best of 3")
    else:
        assert f"(layer {best}, " in said
        assert f": {max(areas):.3f}, error 0.010)" in said
