"""Claimed: SFTTrainer keeps what it does to data and what it logs, with the step inside.

The judge is the plain SFTTrainer on rows without risk: losses, entropy, accuracy and tokens the
same bits; with `stack_loss` off, where all come from our head, within 1e-5 and 1e-4. Exact: risk
reaches the rows of packed, padding-free and conversational data, and which of their tokens are
trained; a resumed run.
"""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from support.builders import random_rows, tiny_model, word_tokenizer, write_jsonl
from support.trainer_runs import (
    SMALL,
    Losses,
    arguments,
    features,
    metrics_rows,
    settings,
    write_reference,
)
from trl import SFTConfig, SFTTrainer

from safereg_dist.errors import CheckpointError, DataError
from safereg_dist.integrations.trl import SafeRegSFTTrainer

METRICS = ("entropy", "mean_token_accuracy", "num_tokens")

FORMS = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("reference"))


def rows(count=40, **how):
    """Rows that all have a response: TRL drops others."""
    found = [row for row in features(count * 2, **how) if any(x != -100 for x in row["labels"])]
    return found[:count]


def run(folder, data, *, cls=SafeRegSFTTrainer, args=None, resume=False, **how):
    seen = Losses()
    made = cls(
        model=tiny_model(**SMALL),
        args=arguments(folder, SFTConfig, **({"max_length": 32, "max_steps": 3} | (args or {}))),
        train_dataset=Dataset.from_list(data),
        processing_class=word_tokenizer(),
        callbacks=[seen],
        **how,
    )
    made.train(resume_from_checkpoint=resume)
    return [log for log in seen.logs if "loss" in log], made


def ledger(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stack_loss", [True, False])
@pytest.mark.parametrize("form", ["padded", "padding_free", "packing"])
def test_trl_logs_what_it_would(reference, tmp_path, form, stack_loss):
    args = FORMS[form]
    harmless = [row | {"risk": 0.0} for row in rows()]
    given = settings(reference, train={"stack_loss": stack_loss})
    ours, _ = run(tmp_path / "own", harmless, args=args, safereg=given)
    theirs, _ = run(tmp_path / "plain", harmless, args=args, cls=SFTTrainer)
    for own, plain in zip(ours, theirs, strict=True):
        if stack_loss:
            assert {name: own[name] for name in ("loss", *METRICS)} == {
                name: plain[name] for name in ("loss", *METRICS)
            }
        assert own["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        for name in METRICS:
            assert own[name] == pytest.approx(plain[name], rel=1e-4), name


@pytest.mark.parametrize("form", ["padding_free", "packing"])
def test_risk_of_rows_that_share_a_line(reference, tmp_path, form):
    data = rows(12)
    args = FORMS[form] | {"max_steps": -1, "num_train_epochs": 1}
    _, made = run(tmp_path, data, args=args, safereg=settings(reference))
    trained = ledger(tmp_path)
    assert sorted(row["risk"] for row in trained) == sorted(row["risk"] for row in data)
    assert all(row["kl_coef"] == float(row["risk"] >= 0.5) for row in trained)
    tokens = sum(label != -100 for row in data for label in row["labels"][1:])
    assert sum(row["response_tokens"] for row in metrics_rows(tmp_path)) == tokens
    assert made.state.global_step == len(metrics_rows(tmp_path))


def test_decisions_reach_packed_rows_by_their_id(reference, tmp_path):
    data = [row | {"risk": 0.0} for row in rows(12)]
    held = data[3]["id"]
    path = write_jsonl(tmp_path / "o.jsonl", [{"id": held, "action": "hold", "reason": "seen"}])
    given = settings(reference, risk={"estimator": "column", "override": str(path)})
    args = {"packing": True, "max_steps": -1, "num_train_epochs": 1}
    run(tmp_path / "run", data, args=args, safereg=given)
    trained = ledger(tmp_path / "run")
    assert sorted(row["id"] for row in trained) == sorted(row["id"] for row in data)
    assert [(row["id"], row["note"]) for row in trained if row["kl_coef"] > 0] == [
        (held, "hold: seen")
    ]


def test_decisions_on_packed_rows_without_ids_are_refused(reference, tmp_path):
    data = [{key: value for key, value in row.items() if key != "id"} for row in rows(12)]
    path = write_jsonl(tmp_path / "o.jsonl", [{"id": "a", "action": "hold", "reason": "seen"}])
    given = settings(
        reference, risk={"estimator": "column", "max_held_back": 1.0, "override": str(path)}
    )
    with pytest.raises(DataError, match=r"risk\.override decides by row id"):
        run(tmp_path / "run", data, args={"packing": True}, safereg=given)


def test_decisions_reach_rows_that_are_found_by_text(reference, tmp_path, capsys):
    raws = [raw | {"id": f"r{i}", "risk": 0.0} for i, raw in enumerate(random_rows(8, seed=4))]
    scored = write_jsonl(tmp_path / "scored.jsonl", raws)
    decisions = [{"id": name, "action": "hold", "reason": "seen"} for name in ("r5", "r9")]
    override = write_jsonl(tmp_path / "override.jsonl", decisions)
    risk = {"estimator": "lookup", "path": str(scored), "override": str(override)}
    data = [{"prompt": raw["prompt"], "completion": " " + raw["response"]} for raw in raws]
    args = {"packing": True, "max_length": 64, "max_steps": -1, "num_train_epochs": 1}
    run(tmp_path / "run", data, args=args, safereg=settings(reference, risk=risk))
    trained = ledger(tmp_path / "run")
    assert sorted(row["id"] for row in trained) == [raw["id"] for raw in raws]
    held = [(row["id"], row["note"]) for row in trained if row["kl_coef"] > 0]
    assert held == [("r5", "hold: seen")]
    assert "1 ids in risk.override=" in capsys.readouterr().err


def test_rows_that_are_not_found_are_counted_in_the_logs(reference, tmp_path, capsys):
    raws = random_rows(8, seed=4)
    scored = write_jsonl(tmp_path / "scored.jsonl", [raw | {"risk": 0.0} for raw in raws[:5]])
    risk = {"estimator": "lookup", "path": str(scored)}
    data = [{"prompt": raw["prompt"], "completion": " " + raw["response"]} for raw in raws]
    args = {"max_steps": 2, "logging_steps": 2, "max_length": 64}
    logs, _ = run(tmp_path / "run", data, args=args, safereg=settings(reference, risk=risk))
    assert [log["safereg/risk_unknown"] for log in logs] == [3]
    assert [log["safereg/active_rows"] for log in logs] == [3]
    said = [line for line in capsys.readouterr().err.splitlines() if "are held back" in line]
    assert len(said) == 1
    assert any(f"its response {raw['response'][:48]!r}" in said[0] for raw in raws[5:])


def test_anchors_beside_packed_rows(reference, tmp_path):
    path = write_jsonl(tmp_path / "anchors.jsonl", random_rows(5, risk=False, seed=3))
    given = settings(reference, data={"anchor": str(path), "anchor_fraction": 0.25})
    data = [row | {"risk": 0.0} for row in rows()]
    run(tmp_path / "run", data, args={"packing": True, "max_steps": 3}, safereg=given)
    anchors = [row for row in ledger(tmp_path / "run") if row["estimator"] == "anchor"]
    others = [row for row in ledger(tmp_path / "run") if row["estimator"] != "anchor"]
    assert anchors
    assert all(row["kl_coef"] == 1.0 and row["risk"] is None for row in anchors)
    assert all(row["kl_coef"] == 0.0 for row in others)


CHAT = [
    {
        "messages": [
            {"role": "user", "content": raw["prompt"]},
            {"role": "assistant", "content": raw["response"]},
        ],
        "risk": raw["risk"],
    }
    for raw in random_rows(12, seed=4)
]
PAIRS = [
    {"prompt": raw["prompt"], "completion": " " + raw["response"], "risk": raw["risk"]}
    for raw in random_rows(12, seed=4)
]


@pytest.mark.parametrize(
    ("data", "args"),
    [(CHAT, {"assistant_only_loss": True}), (PAIRS, {"completion_only_loss": True})],
    ids=["assistant_only", "completion_only"],
)
def test_conversations_keep_their_risk_and_their_answers(reference, tmp_path, data, args):
    args = args | {"max_steps": -1, "num_train_epochs": 1, "max_length": 64}
    _, made = run(tmp_path, data, args=args, safereg=settings(reference))
    assert sorted(row["risk"] for row in ledger(tmp_path)) == sorted(row["risk"] for row in data)
    answers = [raw["response"].split() for raw in random_rows(12, seed=4)]
    eos = 1  # the template's, or the one that TRL adds
    trained = sum(row["response_tokens"] for row in metrics_rows(tmp_path))
    assert trained == sum(len(words) + eos for words in answers)
    assert torch.isfinite(torch.tensor(made.state.log_history[0]["loss"]))


def test_a_finished_run_goes_on_from_what_was_written_alone(reference, tmp_path):
    saves = {"packing": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    how = {"args": saves, "safereg": settings(reference)}
    whole, _ = run(tmp_path / "whole", rows(), **how)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    again, _ = run(tmp_path / "again", rows(), resume=True, **how)
    assert [log["loss"] for log in again] == [log["loss"] for log in whole[2:]]
    ledgers = [(tmp_path / name / "ledger.jsonl").read_bytes() for name in ("whole", "again")]
    assert ledgers[0] == ledgers[1]
    weights = tmp_path / "again" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        run(tmp_path / "again", rows(), resume=True, **how)
