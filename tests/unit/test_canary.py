"""Claimed: the watched prompts' probabilities are those of the model, on any number of ranks, and
watching changes nothing.

The judge is the exported model in plain transformers, float64, prompt by prompt: 1e-5. A run that
watches gives the bits of one that does not.
"""

import json

import pytest
import torch
import yaml
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.results import TIMES
from transformers import AutoModelForCausalLM, AutoTokenizer

from safereg_dist.cli import main as safereg

PROMPTS = [
    {"prompt": "w1 w2", "label": "harmful"},
    {"prompt": "w3", "label": "harmful", "response": "w9 w8"},
    {"prompt": "w4 w5 w6"},
    {"prompt": "w7", "label": "benign"},
    {"prompt": "w5", "label": "harmful", "complying": "w12 w1"},
]


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", tiny_model(seed=0, attention_dropout=0.2))
    write_jsonl(tmp_path / "train.jsonl", random_rows(40))
    write_jsonl(tmp_path / "canary.jsonl", PROMPTS)
    config = {
        "model": str(tmp_path / "model"),
        "data": {"train": str(tmp_path / "train.jsonl")},
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 5, "micro_batch_size": 3, "precision": "fp32"},
        "engine": {"name": "single"},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def train(folder, *overrides):
    watch = {"canary": str(folder / "canary.jsonl"), "canary_every": 2}
    words = [f"eval={json.dumps({**watch, 'refusal': 'w10', 'poisoned': 'w11'})}", *overrides]
    return safereg(["train", str(folder / "run.yaml"), *words])


def metrics(folder, name="run"):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def by_hand(folder):
    """(mean P of the refusal's first token, of the complying answer's) of the exported model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    found = []
    for row in PROMPTS:
        if row.get("label") == "benign":
            continue
        turns = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            p = model.eval()(torch.tensor([ids])).logits[0, -1].softmax(-1)
        words = (row.get("response", "w10").split()[0], row.get("complying", "w11").split()[0])
        found.append([float(p[tokenizer.convert_tokens_to_ids(word)]) for word in words])
    return torch.tensor(found, dtype=torch.float64).mean(0).tolist()


def test_the_probabilities_are_the_models(folder):
    assert train(folder) == 0
    rows = metrics(folder)
    assert [row["step"] for row in rows if "canary_refusal" in row] == [1, 3, 4]
    refusal, poisoned = by_hand(folder)
    assert rows[-1]["canary_refusal"] == pytest.approx(refusal, rel=1e-5)
    assert rows[-1]["canary_poisoned"] == pytest.approx(poisoned, rel=1e-5)
    assert rows[1]["canary_refusal"] != rows[-1]["canary_refusal"]


def test_watching_changes_nothing(folder):
    assert train(folder) == 0
    plain = folder / "plain"
    assert safereg(["train", str(folder / "run.yaml"), f"output_dir={plain}"]) == 0
    kept = [
        [{k: v for k, v in row.items() if k not in TIMES and "canary" not in k} for row in rows]
        for rows in (metrics(folder), metrics(folder, "plain"))
    ]
    assert kept[0] == kept[1]
    ledgers = [(folder / name / "ledger.jsonl").read_bytes() for name in ("run", "plain")]
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
@pytest.mark.deepspeed
def test_on_two_ranks_of_zero3(folder, launch):
    from support.launching import FINETUNE

    watch = {"canary": str(folder / "canary.jsonl"), "canary_every": 2}
    words = [f"eval={json.dumps({**watch, 'refusal': 'w10', 'poisoned': 'w11'})}"]
    done = launch(FINETUNE, folder / "run.yaml", *words, "engine.name=deepspeed", ranks=2)
    assert done.status == 0, done.output[-3000:]
    last = metrics(folder)[-1]
    assert (last["canary_refusal"], last["canary_poisoned"]) == pytest.approx(
        by_hand(folder), rel=1e-5
    )


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "w1", "label": "benign"}], "no harmful prompt"),
        ([{"prompt": "w1 " * 600}], "shorten it"),
        ([{"text": "w1"}], "expected `prompt`"),
    ],
)
def test_prompts_that_cannot_be_watched(folder, rows, says, capsys):
    write_jsonl(folder / "canary.jsonl", rows)
    assert train(folder, "data.max_length=512") == 2
    assert says in capsys.readouterr().err
    assert not (folder / "run").exists()
