"""Claimed: what a Trainer offers around its steps works beside ours.

Exact: evaluation between steps changes nothing of a training without dropout, saved weights are the
trained ones, callbacks see the step's number, dataloader workers and streams give the same run, a
window that is cut short by the end of an epoch is divided by its own tokens.
Rounds: evaluation losses (1e-6) and activation checkpointing (1e-6).
"""

import pytest
import torch
from support.builders import tiny_model
from support.trainer_runs import (
    SMALL,
    Losses,
    dataset,
    features,
    metrics_rows,
    same_weights,
    settings,
    trainer,
    weights,
    write_reference,
)
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from safereg_dist.run.ledger import verify_ledger


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("reference"))


def run(folder, reference, *, args=None, **how):
    """(losses, weights, trainer) of a run."""
    seen = Losses()
    own = how.pop("callbacks", [])
    made = trainer(
        folder, safereg=settings(reference), callbacks=[seen, *own], args=args or {}, **how
    )
    made.train()
    return seen, weights(made.model), made


@pytest.fixture(scope="module")
def usual(reference, tmp_path_factory):
    """The run that the others are held against."""
    return run(tmp_path_factory.mktemp("usual"), reference)


def test_logs_metrics_and_ledger_agree(usual):
    seen, _, made = usual
    folder = made._recorder._folder
    steps = [log for log in seen.logs if "loss" in log]
    for log, row in zip(steps, metrics_rows(folder), strict=True):
        assert log["loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert log["learning_rate"] == row["lr"]
        assert log["grad_norm"] == pytest.approx(row["grad_norm"])
        assert log["safereg/divergence"] == row["divergence"]
        assert log["safereg/rows"] == row["rows"] == 4
    assert [row["step"] for row in metrics_rows(folder)] == list(range(6))
    assert verify_ledger(folder).rows == 24


# ---- evaluation


def correct(prediction):
    """Share of response tokens that are likeliest."""
    labels = torch.from_numpy(prediction.label_ids)[:, 1:]
    likeliest = torch.from_numpy(prediction.predictions)[:, :-1].argmax(-1)
    kept = labels != -100
    return {"correct": float((likeliest == labels)[kept].float().mean())}


def test_evaluation_between_steps(reference, tmp_path):
    # Without dropout: a data loader draws from the generator that dropout uses, in any Trainer.
    usual = run(tmp_path / "usual", reference, model=tiny_model(**SMALL))
    held_out = dataset(10, seed=9)
    args = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    seen, trained, made = run(
        tmp_path / "own",
        reference,
        model=tiny_model(**SMALL),
        args=args,
        eval_dataset=held_out,
        compute_metrics=correct,
    )
    assert same_weights(trained, usual[1])
    assert seen.losses == usual[0].losses
    assert metrics_rows(tmp_path / "own") == metrics_rows(usual[2]._recorder._folder)
    evaluated = [log for log in seen.logs if "eval_loss" in log]
    assert len(evaluated) == 3
    assert all(0 <= log["eval_correct"] <= 1 for log in evaluated)
    copied = AutoModelForCausalLM.from_config(made.model.config)
    copied.load_state_dict(trained)
    plain = trainer(
        tmp_path / "plain",
        cls=Trainer,
        model=copied,
        args={"per_device_eval_batch_size": 4},
        compute_metrics=correct,
        eval_dataset=held_out,
    )
    expected = plain.evaluate()
    assert evaluated[-1]["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert evaluated[-1]["eval_correct"] == expected["eval_correct"]
    ours, theirs = made.predict(held_out), plain.predict(held_out)
    torch.testing.assert_close(ours.predictions, theirs.predictions)
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-6)


def test_evaluation_before_and_without_training(reference, tmp_path):
    made = trainer(
        tmp_path, safereg=settings(reference), eval_dataset=dataset(6, risk=False, seed=2)
    )
    assert made.evaluate()["eval_loss"] > 0


# ---- weights


def test_saved_weights_are_the_trained_ones(usual, tmp_path):
    _, trained, made = usual
    made.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_weights(weights(loaded), trained)
    ids = torch.tensor([[5, 6, 7]])
    made.model.eval()
    assert torch.equal(loaded(input_ids=ids).logits, made.model(input_ids=ids).logits)


# ---- windows


def test_a_window_cut_short_by_the_end_of_an_epoch(reference, tmp_path):
    """10 rows, 2 by 2, two micro-batches a step: the third step of an epoch has one."""
    rows = features(10)
    args = {"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": "sequential"}
    seen, _, _ = run(tmp_path, reference, args=args, train_dataset=dataset(10))
    found = metrics_rows(tmp_path)
    assert [row["rows"] for row in found] == [4, 4, 2] * 2
    tokens = [sum(x != -100 for x in row["labels"][1:]) for row in rows]
    counts = [sum(tokens[0:4]), sum(tokens[4:8]), sum(tokens[8:])]
    assert [row["response_tokens"] for row in found] == counts * 2
    assert seen.losses == pytest.approx([row["loss"] for row in found], rel=1e-6)


def test_windows_without_any_response_token(reference, tmp_path):
    rows = [row | {"labels": [-100] * len(row["input_ids"])} for row in features(8)]
    rows += features(16)
    args = {"train_sampling_strategy": "sequential"}
    seen, trained, _ = run(tmp_path, reference, args=args, train_dataset=rows)
    assert seen.losses[:2] == [0.0, 0.0]
    assert all(loss > 0 for loss in seen.losses[2:])
    assert all(bool(torch.isfinite(value).all()) for value in trained.values())


# ---- callbacks, workers, memory


class Watch(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **_):
        self.seen.append(("begin", state.global_step))

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.seen.append(("update", state.global_step))

    def on_step_end(self, args, state, control, **_):
        self.seen.append(("end", state.global_step))


def test_callbacks_see_the_step(reference, tmp_path):
    watch = Watch()
    run(tmp_path, reference, callbacks=[watch], args={"max_steps": 2})
    one = [("begin", 0), ("update", 0), ("end", 1)]
    assert watch.seen == [*one, ("begin", 1), ("update", 1), ("end", 2)]


def test_dataloader_workers(reference, usual, tmp_path):
    args = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2}
    _, trained, _ = run(tmp_path, reference, args=args)
    assert same_weights(trained, usual[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(reference, usual, tmp_path, use_reentrant):
    how = {"use_reentrant": use_reentrant}
    args = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": how}
    _, trained, _ = run(tmp_path, reference, args=args)
    for name, value in trained.items():
        torch.testing.assert_close(value, usual[1][name], rtol=1e-6, atol=1e-6)


def test_rows_grouped_by_length(reference, tmp_path):
    args = {"train_sampling_strategy": "group_by_length", "max_steps": 3}
    seen, _, _ = run(tmp_path, reference, args=args)
    assert len(seen.losses) == 3


class Stream(IterableDataset):
    def __iter__(self):
        yield from features(40)


def test_a_stream_trains_as_its_rows_do(reference, tmp_path):
    args = {"train_sampling_strategy": "sequential"}
    _, from_rows, _ = run(tmp_path / "rows", reference, args=args)
    _, streamed, _ = run(tmp_path / "stream", reference, train_dataset=Stream())
    assert same_weights(streamed, from_rows)
