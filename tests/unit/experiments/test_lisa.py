"""Claimed: Lisa's run takes turns, and each step is AdamW on cross-entropy plus the proximal term.

Judge: float64. The gradients of the cross-entropy come from plain transformers, the proximal term
and AdamW from NumPy. Exact: whose turn it is, and a run that goes on from saved state. Rounds:
float32 arithmetic of the model, a thousandth of a step.
"""

import numpy as np
import pytest
import torch
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from safereg_dist import build_run, optimizer_step, start_backend
from safereg_dist.config import LisaConfig, config_from_dict
from safereg_dist.errors import ConfigError
from safereg_dist.experiments.lisa import in_turns, turn_at

RHO, LR, EPS = 7.0, 0.01, 1e-3


def raw(folder, **changes):
    return {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "task.jsonl")},
        "risk": {"estimator": "none"},
        "regularizer": {"objective": "none"},
        "train": {"steps": 5, "micro_batch_size": 2, "grad_accum_steps": 2, "precision": "fp32"},
        "optimizer": {"lr": LR, "eps": EPS, "max_grad_norm": 0.0},
        "engine": {"name": "single"},
        "lisa": {
            "safety": str(folder / "safety.jsonl"), "safety_steps": 2, "task_steps": 2, "rho": RHO,
        },
        **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Four rows of each kind: every step of four has all of its kind."""
    save_model(tmp_path / "model", tiny_model(seed=4, num_hidden_layers=1))
    write_jsonl(tmp_path / "task.jsonl", random_rows(4, seed=1, risk=False))
    safety = [{**row, "id": f"safe-{i}"} for i, row in enumerate(random_rows(4, seed=2))]
    write_jsonl(tmp_path / "safety.jsonl", safety)
    return tmp_path


def run_of(folder):
    config = config_from_dict(raw(folder))
    return in_turns(build_run(config, start_backend(config)))


def steps(run, first, last):
    for step in range(first, last):
        optimizer_step(run, run.sources.rows_of_step(step), step=step, lr=LR)


def test_turns():
    settings = LisaConfig(safety="s", safety_steps=2, task_steps=3)
    found = [turn_at(step, settings) for step in range(11)]
    assert [t.is_safety for t in found] == [True, True, *[False] * 3] * 2 + [True]
    assert [t.step for t in found] == [0, 1, 0, 1, 2, 2, 3, 3, 4, 5, 4]
    assert [t.is_last for t in found] == [False, True, False, False, True] * 2 + [False]


def test_rows_are_those_of_the_turn(folder):
    run = run_of(folder)
    for step in range(8):
        ids = {row.id for row in run.sources.rows_of_step(step)}
        begin = "safe" if step % 4 < 2 else "row"
        assert ids == {f"{begin}-{i}" if begin == "safe" else f"row-{i:04d}" for i in range(4)}


def test_steps_are_the_equations(folder):
    run = run_of(folder)
    rows = [run.sources.rows_of_step(step) for step in range(5)]
    names = [name for name, _ in run.model.named_parameters()]
    steps(run, 0, 5)
    got = {name: p.detach().double().numpy() for name, p in run.model.named_parameters()}

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    begun = {name: w.copy() for name, w in weights.items()}
    first = {name: np.zeros_like(w) for name, w in weights.items()}
    second = {name: np.zeros_like(w) for name, w in weights.items()}
    far = []
    for step in range(5):
        if step in (2, 4):  # K1 = K2 = 2
            begun = {name: w.copy() for name, w in weights.items()}
        gradients = gradients_of(model, weights, rows[step])
        far.append(sum(((weights[n] - begun[n]) ** 2).sum() for n in names))
        for name, w in weights.items():
            g = gradients[name] + RHO * (w - begun[name])
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            scale = np.sqrt(second[name] / (1 - 0.999 ** (step + 1))) + EPS
            weights[name] = w - LR * mean / scale
    assert [d > 0 for d in far] == [False, True, False, True, False]
    for name in names:
        np.testing.assert_allclose(got[name], weights[name], atol=1e-5, err_msg=name)


def gradients_of(model, weights, rows):
    """Of the mean cross-entropy over the response tokens of the rows, one row at a time."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(weights[name]))
    model.zero_grad()
    count = sum(sum(row.loss_mask[1:]) for row in rows)
    for row in rows:
        ids, mask = torch.tensor([row.input_ids]), torch.tensor(row.loss_mask[1:]).bool()
        logits = model(ids).logits[0, :-1]
        (cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum") / count).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def test_it_goes_on_from_saved_state(folder):
    """Saved in the middle of a turn: w' is not the weights at that step."""
    whole = run_of(folder)
    steps(whole, 0, 3)
    whole.engine.save(folder / "saved")
    steps(whole, 3, 5)
    again = run_of(folder)
    again.engine.load(folder / "saved")
    steps(again, 3, 5)
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine": {"name": "fsdp2"}}, "engine.name"),
        ({"regularizer": {"objective": "static"}}, "regularizer.objective"),
        ({"train": {"epochs": 2.0}}, "train.steps"),
        ({"data": {"train": "a.jsonl", "streaming": True}}, "streaming"),
    ],
)
def test_what_it_does_not_go_with(folder, changes, says):
    with pytest.raises(ConfigError, match=says):
        config_from_dict(raw(folder, **changes))
