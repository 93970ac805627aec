"""Claimed: the loop around a step takes nothing from it. Every row is logged with its own risk, a
validation changes no step, its loss is that of plain transformers, and a run that was stopped and
started again counts skipped steps and seconds as one that was not.

Runs of one process with the plain engine. The judges are the data file and plain transformers in
float64. Rounds: validation loss (1e-5), sums of seconds (1e-9). The rest is exact.
"""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.results import TIMES, result
from transformers import AutoModelForCausalLM, AutoTokenizer

from safereg_dist.config import load_config
from safereg_dist.errors import EXIT_REQUEUE, CheckpointError, NonFiniteLoss
from safereg_dist.factory import build_run, start_backend
from safereg_dist.run import save
from safereg_dist.run.checkpoint import (
    RunState,
    config_hash,
    load_checkpoint,
    read_state,
    saved_checkpoints,
)
from safereg_dist.run.resume import find_checkpoint
from safereg_dist.run.save import Saver
from safereg_dist.trainer import train

ROWS, STEPS, ROWS_PER_STEP = 8, 4, 4
"""Two epochs of two steps: each shows every row once."""
THRESHOLD = 0.5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with model, training rows, five validation rows, and a configuration."""
    folder = tmp_path_factory.mktemp("loop")
    save_model(folder / "model", tiny_model())
    write_jsonl(folder / "train.jsonl", random_rows(ROWS))
    write_jsonl(folder / "validation.jsonl", random_rows(5, seed=7, risk=False))
    config = {
        "model": str(folder / "model"),
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
        },
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "optimizer": {"lr": 1e-3},
        "train": {
            "steps": STEPS,
            "precision": "fp32",
            "micro_batch_size": 2,
            "grad_accum_steps": ROWS_PER_STEP // 2,
        },
        "engine": {"name": "single"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def built(world, name, *changes):
    """A run that writes below the world's folder, not yet begun or to be gone on with."""
    config = load_config(world / "run.yaml", [f"output_dir={world / name}", *changes])
    return build_run(config, start_backend(config))


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def metrics_of(world, name, *changes):
    assert train(built(world, name, *changes), None) == 0
    return lines(world / name / "metrics.jsonl")


def risks_of_rows(world):
    return {row["id"]: row["risk"] for row in lines(world / "train.jsonl")}


def epochs(metrics):
    """The rows of metrics of each epoch."""
    per_epoch = ROWS // ROWS_PER_STEP
    return [metrics[i : i + per_epoch] for i in range(0, STEPS, per_epoch)]


def test_a_validation_changes_no_step(world):
    plain = metrics_of(world, "plain")
    validated = metrics_of(world, "validated", "train.eval_every=1")
    assert ["validation_loss" in row for row in validated] == [True] * STEPS
    for before, after in zip(plain, validated, strict=True):
        assert {k: after[k] for k in before if k not in TIMES} == {
            k: before[k] for k in before if k not in TIMES
        }
    risks = list(risks_of_rows(world).values())
    for steps in epochs(validated):
        assert np.mean([row["risk_mean"] for row in steps]) == pytest.approx(np.mean(risks))
        assert sum(row["active_rows"] for row in steps) == sum(r >= THRESHOLD for r in risks)
        assert max(row["kl_coef_max"] for row in steps) == 1.0


def test_saving_changes_no_step_and_says_how_long_it_took(world):
    """At once and asynchronously: the rows after a save, and the summary."""
    metrics_of(world, "unsaved")
    for name, words in (("at-once", []), ("async", ["train.async_save=true"])):
        rows = metrics_of(world, name, "train.save_every=1", *words)
        assert result(world / name) == result(world / "unsaved")
        assert ["save_blocked_s" in row for row in rows] == [False] + [True] * (STEPS - 1)
        said = json.loads((world / name / "summary.json").read_text())["checkpoints"]
        assert said["saved"] == STEPS - 1
        blocked = sum(row.get("save_blocked_s", 0.0) for row in rows)
        assert 0 < blocked <= said["blocked_seconds"]  # the last step's save is waited for after it
        assert said["seconds"] > 0
        if not words:
            assert blocked == pytest.approx(said["blocked_seconds"], rel=1e-9)


def test_a_save_that_fails_ends_the_run_with_its_reason(world, monkeypatch):
    """The copy of the first checkpoint finds no place: the step after it raises."""
    run = built(world, "unsavable", "train.save_every=1", "train.async_save=true", "train.steps=8")

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(save, "copied", full)
    with pytest.raises(CheckpointError, match=r"expected to write a checkpoint.*No space left"):
        train(run, None)
    assert not list((world / "unsavable" / "checkpoint").iterdir())
    assert not (world / "unsavable" / "summary.json").exists()


def test_a_validation_leaves_the_model_in_training(world):
    """Two micro-batches a step, three batches of validation rows."""
    run, is_training = built(world, "modes", "train.eval_every=1", "train.steps=2"), []
    run.model.register_forward_pre_hook(lambda model, _: is_training.append(model.training))
    assert train(run, None) == 0
    assert is_training == 2 * [True, True, False, False, False]


def test_the_first_epoch_ends_after_its_rows(world):
    run, told = built(world, "epochs"), []
    plan = run.regularizer.plan

    def noted(rows, **how):
        told.append((how["micro_batches"], how["in_first_epoch"]))
        return plan(rows, **how)

    run.regularizer.plan = noted
    assert train(run, None) == 0
    assert told == [(2, True), (2, True), (2, False), (2, False)]


def test_validation_is_the_mean_over_all_its_rows(world):
    """Five rows in batches of two; the exported weights are those of the last validation."""
    last = metrics_of(world, "loss", "train.eval_every=3")[-1]
    model = AutoModelForCausalLM.from_pretrained(world / "loss" / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(world / "loss" / "model")
    total, count = 0.0, 0
    for row in lines(world / "validation.jsonl"):
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(encoded["input_ids"])
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        for place in np.flatnonzero(encoded["assistant_masks"]):
            total -= float(logprobs[place - 1, ids[place]])
            count += 1
    assert last["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_every_row_is_logged_with_its_own_risk(world):
    """Two micro-batches a step, whose rows are brought into another order for the reference."""
    metrics_of(world, "rows", "reference.balance=none", "train.micro_batch_size=1",
               "train.grad_accum_steps=4")  # fmt: skip
    risks = risks_of_rows(world)
    ledger = lines(world / "rows" / "ledger.jsonl")
    assert len(ledger) == STEPS * ROWS_PER_STEP
    for entry in ledger:
        assert entry["risk"] == risks[entry["id"]]
        assert entry["kl_coef"] == float(risks[entry["id"]] >= THRESHOLD)


def test_screening_is_not_counted_in_the_first_step(world):
    """The gate asks for the risk of every row before step 0."""
    limits = {"low": 0.3, "high": 0.7}
    parts = [f"{{category: {c}, estimator: column, threshold: {t}}}" for c, t in limits.items()]
    changes = ["risk.estimator=max", "risk.max_held_back=0.99", f"risk.parts=[{', '.join(parts)}]"]
    metrics = metrics_of(world, "screened", *changes)
    risks = list(risks_of_rows(world).values())
    for steps in epochs(metrics):
        for category, threshold in limits.items():
            counted = sum(row[f"risky_rows/{category}"] for row in steps)
            assert counted == sum(r >= threshold for r in risks), category


# Stopped and started again


def with_lost_gradients(run, steps, *, first=0, stop_at=None):
    """The run, whose gradient is not finite in these steps, and that is asked to stop in one."""
    seen = iter(range(first, STEPS * 10))

    def spoil(grad):
        step = next(seen)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return grad * float("nan") if step in steps else grad

    run.model.get_input_embeddings().weight.register_hook(spoil)
    return run


ONE_BATCH = ("train.micro_batch_size=4", "train.grad_accum_steps=1", "train.steps=6")


def test_skipped_steps_and_seconds_go_on_after_a_stop(world):
    run = with_lost_gradients(built(world, "counted", *ONE_BATCH), {1, 2}, stop_at=2)
    assert train(run, None) == EXIT_REQUEUE
    again = with_lost_gradients(built(world, "counted", *ONE_BATCH), {4}, first=3)
    assert train(again, find_checkpoint(again.config, again.ranks)) == 0
    metrics = lines(world / "counted" / "metrics.jsonl")
    assert [row["grad_norm"] is None for row in metrics] == [False, True, True, False, True, False]
    summary = json.loads((world / "counted" / "summary.json").read_text())
    assert summary["non_finite_steps"] == 3
    total = sum(row["step_time_s"] for row in metrics)
    assert summary["seconds"] == pytest.approx(total, rel=1e-9)


def test_skipped_steps_in_a_row_are_counted_over_a_stop(world):
    run = with_lost_gradients(built(world, "lost", *ONE_BATCH), {1, 2}, stop_at=2)
    assert train(run, None) == EXIT_REQUEUE
    again = with_lost_gradients(built(world, "lost", *ONE_BATCH), range(6), first=3)
    with pytest.raises(NonFiniteLoss, match="up to step 3,"):
        train(again, find_checkpoint(again.config, again.ranks))


def test_random_states_go_through_a_checkpoint(world, tmp_path: Path):
    """Of every global generator that a model's own code may draw from."""
    import random

    def draws():
        return (torch.rand(3).tolist(), [random.random() for _ in range(3)], np.random.rand(3))

    run = built(world, "random")
    state = RunState(
        step=1,
        world_size=1,
        config_hash=config_hash(run.config),
        order_digest="rows",
        non_finite_steps=0,
        non_finite_in_a_row=0,
        metrics_bytes=0,
        ledger_bytes=[0],
        seconds=1.0,
    )
    parts = {"engine": run.engine, "regularizer": run.regularizer, "ranks": run.ranks}
    np.random.seed(5)
    draws()  # no generator is at its beginning
    Saver(tmp_path, keep=1, **parts).save(state, logs={}, key=None)
    expected = draws()
    draws()
    (path,) = saved_checkpoints(tmp_path)
    load_checkpoint(path, read_state(path), seed=0, order_digest="rows", **parts)
    for found, wanted in zip(draws(), expected, strict=True):
        assert list(found) == list(wanted)
