"""Claimed: what hides below the threshold is found, and honest risks are not called a heap.

Counts are checked by hand, probabilities against sums of binomial terms in Python's own integers;
the gate and `safereg audit` refuse and warn in real runs on a column. Rates of false alarms and of
detection on the embedded world and a real model are in benchmarks/results/hiding.csv; here honest
risks are drawn from a falling density over fixed seeds.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from support.builders import save_model, tiny_model, word_tokenizer, write_jsonl

from safereg_dist.cli import main
from safereg_dist.config import load_config
from safereg_dist.errors import ConfigError
from safereg_dist.risk.stage import ColumnRisk, RiskStage, WeightedSource
from safereg_dist.run.shape import SIGNIFICANT, Shape, limits_of, refuse_what_hides, what_hides

LIMITS = {"heap": 0.02, "spread": 0.2, "masked": 0.02}


def shape_of(risks, *, threshold=0.5, benign_share=None) -> Shape:
    counts = Shape.of([(r >= threshold, r, {}) for r in risks], threshold, {}).counts
    return Shape.of_counts(counts, benign_share)


def test_rows_are_counted_by_their_distance_to_the_threshold():
    at = [0.0, 0.2499, 0.25, 0.31, 0.32, 0.4, 0.44, 0.4999, 0.5, 0.9]
    shape = shape_of(at)
    assert (shape.rows, shape.held, shape.bins) == (10, 2, (1, 1, 1, 0, 1, 0, 1, 1))
    assert shape_of([r / 5 for r in at[:8]], threshold=0.1).bins == shape.bins
    nothing = Shape.of([(True, math.nan, {}), (False, None, {})], 0.5, {})
    assert (nothing.rows, nothing.held, nothing.near) == (2, 1, 0)
    assert shape_of([0.0, 0.5], threshold=0.0).counts == [2, 2, *[0] * 9]


@pytest.mark.parametrize(
    ("bins", "heap"),
    [
        ((9, 5, 2, 0, 0, 0, 0, 0), 0),
        ((0, 0, 0, 0, 0, 0, 0, 7), 7),
        ((5, 2, 0, 0, 9, 4, 0, 0), 13),
        ((3, 3, 3, 3, 3, 3, 3, 3), 0),
        ((8, 4, 4, 2, 2, 9, 9, 1), 14),
    ],
)
def test_a_heap_is_what_rises_towards_the_threshold(bins, heap):
    shape = Shape(rows=100, held=0, bins=bins, masked=0)
    assert shape.heap == heap
    two = [bins[i] + bins[i + 1] for i in range(7)]
    pairs = [(two[i], two[j]) for i in range(7) for j in range(7) if i + 2 <= j]
    assert len(pairs) == 15
    tails = [sum(math.comb(a + b, k) for k in range(b, a + b + 1)) / 2 ** (a + b) for a, b in pairs]
    assert shape.heap_p == pytest.approx(min(1.0, 15 * min(tails)))


def test_honest_risks_are_no_heap():
    """Falling densities of several widths, 200 data sets of 600 rows each: none is refused."""
    noticed = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        width = (0.02, 0.05, 0.1, 0.2)[seed % 4]
        harmless, harmful = draw.exponential(width, 500), 1 - draw.exponential(0.15, 100)
        shape = shape_of(np.clip([*harmless, *harmful], 0, 1).tolist())
        noticed += shape.heap_p < SIGNIFICANT
        assert what_hides(shape, LIMITS, 0.5) is None, (seed, shape)
    assert noticed <= 2


@pytest.mark.parametrize("level", [0.44, 0.48])
@pytest.mark.parametrize(("share", "width"), [(0.05, 0.02), (0.15, 0.1), (0.6, 0.02), (0.6, 0.1)])
def test_a_heap_just_below_the_threshold_is_refused(level, share, width):
    for seed in range(20):
        draw = np.random.default_rng(seed)
        placed = round(2000 * share)
        risks = [*draw.exponential(width, 2000 - placed), *draw.normal(level, 0.01, placed)]
        said = what_hides(shape_of(np.clip(risks, 0, 0.4999).tolist()), LIMITS, 0.5)
        assert said is not None
        assert "heap" in said


def test_a_spread_is_refused_only_beyond_the_calibration():
    risks = [0.01] * 400 + np.linspace(0.26, 0.49, 600)[::-1].tolist()
    assert what_hides(shape_of(risks), LIMITS, 0.5) is None  # nobody knows what is usual
    said = what_hides(shape_of(risks, benign_share=0.05), LIMITS, 0.5)
    assert said is not None
    assert "of benign calibration rows at most 5.0%" in said
    assert what_hides(shape_of(risks, benign_share=0.55), LIMITS, 0.5) is None


def test_a_response_that_is_riskier_than_its_prompt_is_masked_unless_held():
    positions = {"a-prompt": "prompt", "a-response": "response", "judge": "prompt"}
    positions.pop("judge")
    cases = [
        (False, {"a-prompt": 0.1, "a-response": 0.8}, 1),
        (True, {"a-prompt": 0.1, "a-response": 0.8}, 0),
        (False, {"a-prompt": 0.6, "a-response": 0.8}, 0),
        (False, {"a-prompt": 0.1, "a-response": 0.4}, 0),
        (False, {"a-prompt": 0.1, "a-response": math.nan}, 1),
        (False, {"a-prompt": None, "a-response": None}, 0),
    ]
    for is_held, by_category, masked in cases:
        assert Shape.of([(is_held, 0.2, by_category)], 0.5, positions).masked == masked
    rows = [(False, 0.2, {"a-prompt": 0.1, "a-response": 0.8})] * 5
    shape = Shape.of([*rows, *[(False, 0.0, {})] * 95], 0.5, positions)
    assert "5 of 100 rows (5.0%) have a risky response" in str(what_hides(shape, LIMITS, 0.5))


def test_the_shares_of_calibration_rows_are_added_over_sources():
    def probe(share):
        return SimpleNamespace(position="prompt", benign_share=lambda low, high: share)

    def stage(*shares, rule="max"):
        sources = [
            WeightedSource(f"c{i}", ColumnRisk(), 0.5, 1.0, probe(share))
            for i, share in enumerate(shares)
        ]
        return RiskStage(sources, rule=rule)

    assert stage(0.1, 0.2).benign_share(0.5) == pytest.approx(0.3)
    assert stage(0.9, 0.2).benign_share(0.5) == 1.0
    assert stage(0.1, None).benign_share(0.5) is None
    assert stage(0.1, 0.2, rule="weighted").benign_share(0.5) is None
    assert stage(0.1, 0.2).benign_share(0.4) is None  # not the scale of the sources
    assert RiskStage([WeightedSource("", ColumnRisk(), 0.5)]).benign_share(0.5) is None


# Real runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, tiny_model(vocab=len(word_tokenizer())))


def run_yaml(folder, model, risks, **risk):
    rows = [{"prompt": f"w{n % 9 + 1} w2", "response": "w3", "risk": r, "id": f"r{n}"}
            for n, r in enumerate(risks)]  # fmt: skip
    write_jsonl(folder / "train.jsonl", rows)
    config = {
        "model": str(model),
        "data": {"train": str(folder / "train.jsonl")},
        "risk": {"estimator": "column", **risk},
        "train": {"steps": 1, "micro_batch_size": 4, "precision": "fp32"},
        "engine": {"name": "single"},
        "output_dir": str(folder / "out"),
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    return folder / "run.yaml"


def test_a_data_set_that_sits_just_below_the_threshold_is_not_waved_through(
    tmp_path, model, capsys
):
    """The finding: 60 % of the rows at 0.44 under a threshold of 0.5."""
    path = run_yaml(tmp_path, model, [0.44] * 36 + [0.02] * 24)
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    for part in ("36 of 60 rows (60.0%)", "heap", "threshold 0.5", "safereg audit",
                 "risk.max_hidden=1", "risk.override"):  # fmt: skip
        assert part in said
    assert not (tmp_path / "out").exists()
    assert main(["audit", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "WARNING: 36 of 60 rows" in printed
    assert "would refuse to start" in printed
    assert "refuse to start: rows hide below the threshold" in printed  # not the share held back
    assert "would be held back, at most" not in printed
    assert "calibrated" not in printed  # what benign rows have there nobody knows
    report = json.loads((tmp_path / "out.audit" / "audit.json").read_text())
    assert report["below_threshold"] == [0, 0, 0, 0, 0, 0, 36, 0]
    assert not report["training_would_start"]
    assert main(["train", str(path), "risk.max_hidden=1"]) == 0


def test_schedules_without_a_cliff_refuse_nothing(tmp_path):
    shape = shape_of([0.44] * 60 + [0.02] * 40)
    path = tmp_path / "run.yaml"
    for schedule, refuses in (("step", True), ("threshold", True), ("linear", False)):
        path.write_text(
            "model: m\ndata: {train: t}\noutput_dir: o\nrisk: {estimator: column}\n"
            f"regularizer: {{schedule: {schedule}}}\n"
        )
        config = load_config(path)
        assert bool(limits_of(config)) == refuses
        if refuses:
            with pytest.raises(ConfigError, match="heap") as caught:
                refuse_what_hides(shape, config, 0.5, is_sample=False, look="here")
            assert "\n" not in str(caught.value)
        else:
            refuse_what_hides(shape, config, 0.5, is_sample=False, look="here")
