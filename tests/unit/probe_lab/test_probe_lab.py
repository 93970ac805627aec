"""Claimed: the laboratory's scores are their definitions, its fit is an optimum, its threshold
keeps the recall it promises, its split keeps repetitions together, and a label that can be read
from a model's states is found, saved, and found again.

The judges are brute-force loops, gradients written out by hand, and simulation. Exact: scores up to
1e-12, splits, determinism. Statistical: the recall guarantee (mean of 2000 draws, four standard
errors).
"""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracles
from support.builders import WORDS, save_model, tiny_model, word_tokenizer, write_jsonl

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import ConfigError, DataError, ProbeError, SafeRegError
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.probe_lab.background import background_prompts
from safereg_dist.probe_lab.collect import collect_hidden_states
from safereg_dist.probe_lab.fit import fit_probe
from safereg_dist.probe_lab.logistic import fit_logistic
from safereg_dist.probe_lab.scores import (
    auroc,
    average_precision,
    bootstrap,
    brier,
    flagged_fraction,
    log_loss,
    spread,
)
from safereg_dist.probe_lab.split import REGIONS, split_rows
from safereg_dist.probe_lab.threshold import recall_threshold
from safereg_dist.risk.probe import POOLINGS, Probe

# Few values, so that ties are the rule.
SCORED = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.booleans()),
    min_size=2,
    max_size=25,
).filter(lambda rows: 0 < sum(label for _, label in rows) < len(rows))


# Scores


def split_columns(rows):
    return np.array([s for s, _ in rows]), np.array([label for _, label in rows])


@settings(deadline=None)
@given(SCORED)
def test_auroc_counts_pairs(rows):
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, is_p in rows
        if is_p
        for n, is_n in rows
        if not is_n
    ]
    assert auroc(*split_columns(rows)) == pytest.approx(np.mean(wins), abs=1e-12)


@settings(deadline=None)
@given(SCORED)
def test_average_precision_walks_down_the_thresholds(rows):
    positives = sum(label for _, label in rows)
    area = recall_before = 0.0
    for threshold in sorted({s for s, _ in rows}, reverse=True):
        flagged = [label for s, label in rows if s >= threshold]
        recall = sum(flagged) / positives
        area += (recall - recall_before) * sum(flagged) / len(flagged)
        recall_before = recall
    assert average_precision(*split_columns(rows)) == pytest.approx(area, abs=1e-12)


@settings(deadline=None)
@given(SCORED, st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_calibration_scores(rows, threshold):
    p, y = split_columns(rows)
    assert brier(p, y) == pytest.approx(sum((s - label) ** 2 for s, label in rows) / len(rows))
    expected = sum(s >= threshold for s, _ in rows) / len(rows)
    assert flagged_fraction(p, threshold) == pytest.approx(expected)
    inside = np.clip(p, 0.01, 0.99)
    losses = [-math.log(s if label else 1 - s) for s, label in zip(inside, y, strict=True)]
    assert log_loss(inside, y) == pytest.approx(np.mean(losses))
    assert np.isfinite(log_loss(p, y))


def test_scores_without_an_answer():
    one_class = (np.array([0.2, 0.4]), np.array([True, True]))
    assert math.isnan(auroc(*one_class))
    assert math.isnan(flagged_fraction(np.array([]), 0.5))
    drawn = bootstrap(*one_class, np.arange(2), threshold=0.5, draws=5, seed=0)
    assert spread(drawn["auroc"]) == 0.0


# The fit


@pytest.mark.parametrize("l2", [1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("kind", ["noise", "separable", "wide", "correlated"])
def test_the_fit_is_an_optimum(kind, l2):
    generator = torch.Generator().manual_seed(2)
    rows, features = (30, 64) if kind == "wide" else (80, 7)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    y = (torch.rand(rows, generator=generator) < 0.3).double()
    if kind == "separable":
        y = (x[:, 0] > 0.4).double()
    if kind == "correlated":
        x[:, 1:] = x[:, :1] + 1e-3 * x[:, 1:]
    weight, bias = fit_logistic(x, y, l2)
    # By hand: mean over rows of class weight times (p - y), classes weighted equally.
    x_, y_, w_ = x.numpy(), y.numpy(), weight.numpy()
    p = 1 / (1 + np.exp(-(x_ @ w_ + float(bias))))
    class_weight = np.where(y_ > 0.5, 0.5 / y_.mean(), 0.5 / (1 - y_.mean()))
    residual = class_weight * (p - y_) / len(y_)
    assert np.abs(x_.T @ residual + l2 * w_).max() < 1e-6
    assert abs(residual.sum()) < 1e-6
    assert weight.dtype == torch.float64


# The threshold


@pytest.mark.parametrize(("positives", "recall"), [(19, 0.95), (40, 0.9), (25, 0.8), (9, 0.9)])
def test_the_threshold_keeps_its_promise(positives, recall):
    draw = np.random.default_rng(0)
    caught = []
    for _ in range(2000):
        scores = draw.beta(2, 1, positives + 1)
        threshold, conformal = recall_threshold(scores[1:], draw.random(30), recall)
        assert threshold <= conformal
        caught.append(scores[0] >= threshold)
    error = math.sqrt(recall * (1 - recall) / len(caught))
    assert np.mean(caught) >= recall - 4 * error


@pytest.mark.parametrize("recall", [0.5, 0.75, 0.8, 0.9, 0.95, 0.98, 0.99])
def test_how_many_positives_a_recall_needs(recall):
    needed = round(1 / (1 - recall)) - 1
    positives = np.linspace(0.2, 0.9, needed)
    _, conformal = recall_threshold(positives, np.array([0.95]), recall)
    assert conformal == positives[0]
    with pytest.raises(ProbeError, match=f"at least {needed} harmful"):
        recall_threshold(positives[1:], np.array([0.95]), recall)


def test_recalls_that_cannot_be_had():
    with pytest.raises(ProbeError):
        recall_threshold(np.array([]), np.array([0.5]), 0.5)
    with pytest.raises(ProbeError):
        recall_threshold(np.linspace(0, 1, 1000), np.array([0.5]), 1.0)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=30), st.lists(st.floats(0, 1), max_size=30))
def test_moving_the_threshold_costs_nothing_seen(positives, negatives):
    p, n = np.array(positives), np.array(negatives)
    threshold, conformal = recall_threshold(p, n, 0.8)
    assert 0 <= threshold <= conformal <= 1
    assert flagged_fraction(p, threshold) >= flagged_fraction(p, conformal)
    if negatives:
        assert (n >= threshold).sum() == (n >= conformal).sum()


# The split


def prompt(text, label="benign", id_=""):
    return LabelledPrompt(
        id=id_, messages=[{"role": "user", "content": text}], label=label, response=None
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thesplit_rows(seed):
    labelled = [prompt(f"bad {i % 40}", "harmful") for i in range(60)]
    labelled += [prompt(f"good {i % 70}") for i in range(90)]
    labelled += [prompt("BAD, 3!", "harmful"), prompt("good   5")]
    negatives = [prompt(f"salad {i}") for i in range(50)]
    rows = split_rows(labelled, negatives, 0.2, seed)
    texts = [
        " ".join(re.findall(r"\w+", p.messages[0]["content"].lower())) for p in labelled + negatives
    ]
    part_of = {}
    for text, part in zip(texts, rows.part, strict=True):
        assert part_of.setdefault(text, part) == part
    for kind, total in (("bad", 40), ("good", 70), ("salad", 50)):
        count = Counter(part for text, part in part_of.items() if text.startswith(kind))
        shares = [count[part] / total for part in range(3)]
        assert shares == pytest.approx([0.6, 0.2, 0.2], abs=1.01 / total)
    assert rows.harmful.tolist() == [t.startswith("bad") for t in texts]
    assert rows.background.tolist() == [t.startswith("salad") for t in texts]
    again = split_rows(labelled, negatives, 0.2, seed)
    assert (again.part == rows.part).all()
    assert (split_rows(labelled, negatives, 0.2, seed + 7).part != rows.part).any()
    positives = [t for t, kept in zip(texts, rows.calibration_positives, strict=True) if kept]
    assert len(positives) == len(set(positives)) == 8


def test_a_prompt_with_both_labels_stays_in_one_part():
    labelled = [prompt(f"same {i}", label) for i in range(30) for label in ("harmful", "benign")]
    rows = split_rows(labelled, [], 0.2, 0)
    assert (rows.part[::2] == rows.part[1::2]).all()


# Background


def test_background_has_no_word_that_harm_prefers():
    tokenizer = word_tokenizer()
    labelled = [prompt(f"w{i} w{i + 1} the", "harmful") for i in range(0, 40, 2)]
    labelled += [prompt(f"w{i} w{i + 1}") for i in range(30, 90, 2)]
    made = background_prompts(tokenizer, labelled, count=300, seed=0)
    assert len(made) == 300
    assert {p.label for p in made} == {"benign"}
    assert len({p.id for p in made}) == 300
    used = Counter(w for p in made for w in p.messages[0]["content"].split())
    harmful = {f"w{i}" for i in range(30)} | {"the"}  # w30 to w39 are as common on both sides
    assert not harmful & set(used)
    assert {f"w{i}" for i in range(40, 90)} <= set(used)
    assert all(3 <= len(p.messages[0]["content"].split()) <= 20 for p in made)
    assert background_prompts(tokenizer, labelled, count=300, seed=0) == made
    assert background_prompts(tokenizer, labelled, count=300, seed=1) != made


def test_background_without_words():
    everything = [prompt(" ".join(WORDS), "harmful"), prompt("nothing")]
    with pytest.raises(ConfigError, match="--background 0"):
        background_prompts(word_tokenizer(), everything, count=1, seed=0)
    assert background_prompts(word_tokenizer(), everything, count=0, seed=0) == []


# Hidden states


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_states_are_those_of_each_prompt_alone(pooling, batch_size):
    model, tokenizer = tiny_model(seed=3).eval(), word_tokenizer()
    prompts = [prompt(" ".join(WORDS[: 1 + (5 * i) % 7])) for i in range(8)]
    got = collect_hidden_states(
        model, tokenizer, prompts, pooling=pooling, batch_size=batch_size, progress=False
    )
    assert got.shape == (4, 8, 64 if pooling == "both_prompt" else 32)
    for place, p in enumerate(prompts):
        ids = tokenizer.apply_chat_template(
            p.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            states = torch.stack(model(ids, output_hidden_states=True).hidden_states)[:, 0]
        expected = torch.stack([torch.from_numpy(oracles.pooled(s, pooling)) for s in states])
        torch.testing.assert_close(got[:, place], expected.float(), rtol=1e-4, atol=1e-5)


# End to end


def readable(count=240, seed=0):
    """Prompts whose label is one word, which any layer's states tell at its own position."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        harmful = bool(i % 2)
        words = [str(w) for w in draw.choice(WORDS[10:], size=draw.integers(1, 4))]
        rows.append(
            {
                "prompt": " ".join([*words, "w1" if harmful else "w2"]),
                "label": "harmful" if harmful else "benign",
            }
        )
    return rows


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("lab") / "model", tiny_model(seed=5))


def fit(model_dir, data, out, **changes):
    return fit_probe(
        model_dir, data, out, **{"background": 60, "progress": False, "recall": 0.9, **changes}
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_readable_label_is_found(model_dir, tmp_path, capsys, pooling):
    # In the mean one word of four is a weak sign, which takes more rows to learn.
    count = {"last_prompt_token": 240, "mean_prompt": 800, "both_prompt": 240}[pooling]
    data = write_jsonl(tmp_path / "labelled.jsonl", readable(count))
    report = fit(model_dir, data, tmp_path / "probe", pooling=pooling)
    printed = capsys.readouterr().out
    assert [r.layer for r in report.layers] == [1, 2, 3]
    assert printed.count("<- chosen") == 1
    assert report.chosen in report.layers
    assert report.chosen.auroc > 0.95
    assert report.chosen.recall >= 0.8
    probe = Probe.load(tmp_path / "probe")
    assert (probe.layer, probe.pooling) == (report.chosen.layer, pooling)
    assert probe.threshold == report.chosen.threshold == report.probe.threshold
    assert probe.fingerprint == model_fingerprint(tiny_model(seed=5))
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == [
        "probe.json",
        "probe.png",
        "probe.safetensors",
        "reliability.png",
        "roc.png",
    ]
    # New prompts, through the saved files alone.
    model, fresh = tiny_model(seed=5).eval(), readable(100, seed=9)
    states = collect_hidden_states(
        model,
        word_tokenizer(),
        [prompt(r["prompt"], r["label"]) for r in fresh],
        pooling=pooling,
        progress=False,
    )[probe.layer]
    flagged = probe.probability(states).numpy() >= probe.threshold
    harmful = np.array([r["label"] == "harmful" for r in fresh])
    assert flagged[harmful].mean() > 0.8
    assert flagged[~harmful].mean() < 0.15


def test_the_file_says_what_was_measured(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "labelled.jsonl", readable(120))
    fit(model_dir, data, tmp_path / "probe", layers=[3, 1, 3], background=0)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    facts = json.loads((tmp_path / "probe" / "probe.json").read_text(), parse_constant=refuse)
    assert [layer["layer"] for layer in facts["meta"]["layers"]] == [1, 3]
    assert facts["meta"]["required_recall"] == 0.9
    assert facts["layer"] in (1, 3)


def test_the_seed_decides(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "labelled.jsonl", readable(120))
    files = []
    for place, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"probe{place}"
        fit(model_dir, data, out, seed=seed, layers=[2])
        files.append([(out / name).read_bytes() for name in ("probe.json", "probe.safetensors")])
    assert files[0] == files[1]
    assert files[0][1] != files[2][1]


def test_labels_that_cannot_be_read_are_shown_as_such(model_dir, tmp_path):
    draw = np.random.default_rng(0)
    rows = [
        {"prompt": " ".join(draw.choice(WORDS, size=6)), "label": str(draw.integers(0, 2))}
        for _ in range(200)
    ]
    data = write_jsonl(tmp_path / "labelled.jsonl", rows)
    report = fit(model_dir, data, tmp_path / "probe", recall=0.8)
    assert 0.2 < report.chosen.auroc < 0.8


def test_states_that_never_move(model_dir, tmp_path):
    rows = [{"prompt": "w1 w2", "label": ("harmful", "benign")[i % 2]} for i in range(60)]
    data = write_jsonl(tmp_path / "labelled.jsonl", rows)
    with pytest.raises(SafeRegError):  # one text in one part: nothing is left for the others
        fit(model_dir, data, tmp_path / "probe", background=0)
    assert not (tmp_path / "probe").exists()


@pytest.mark.parametrize(
    ("rows", "options", "error", "says"),
    [
        (readable(40)[::2], {}, DataError, "both kinds"),
        (readable(40)[1::2], {}, DataError, "both kinds"),
        ([*readable(40), {"prompt": "w1"}], {}, DataError, "no `label`"),
        ([*readable(40), {"prompt": "w1", "label": "odd"}], {}, DataError, "use harmful or benign"),
        ([*readable(40), {"text": "w1"}], {}, DataError, "messages"),
        ([], {}, DataError, "no prompt"),
        (readable(4), {}, SafeRegError, "harmful"),
        (readable(40), {"recall": 0.999}, ProbeError, "recall"),
        (readable(40), {"recall": 1.0}, ConfigError, "--recall"),
        (readable(40), {"recall": math.nan}, ConfigError, "--recall"),
        (readable(40), {"layers": [4]}, ConfigError, "layers 1 to 3"),
        (readable(40), {"layers": [0]}, ConfigError, "layers 1 to 3"),
        (readable(40), {"layers": []}, ConfigError, "--layers"),
        (readable(40), {"pooling": "max"}, ConfigError, "--pooling"),
        (readable(120), {"batch_size": 0}, ConfigError, "--batch-size"),
        ([*readable(120), {"prompt": "w1 " * 300, "label": "benign"}], {}, DataError, "tokens"),
        ([*readable(120)[1::2], readable(1)[0]], {"background": 0}, DataError, "too few benign"),
    ],
)
def test_bad_input(model_dir, tmp_path, rows, options, error, says):
    data = write_jsonl(tmp_path / "labelled.jsonl", rows)
    with pytest.raises(error) as caught:
        fit(model_dir, data, tmp_path / "probe", **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "probe").exists()


def test_an_output_folder_that_is_a_file(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "labelled.jsonl", readable(120))
    (tmp_path / "probe").write_text("mine")
    with pytest.raises(ProbeError, match="writable"):
        fit(model_dir, data, tmp_path / "probe", layers=[1])
    assert (tmp_path / "probe").read_text() == "mine"


def test_the_parts_are_three():
    assert REGIONS == ("fit", "calibrate", "hold_out")
