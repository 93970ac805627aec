"""Claimed: the influence of a row is what a step on the head does to the watched answers, computed
in chunks without a gradient; its risk is the same from a run, an audit and a part of `max`.

Rounds: float32 against outer products in float64 NumPy, 1e-5 of the largest value (2e-5 in risks of
a whole model). A finite difference of float64 agrees to 1e-3. Which rows are scored is exact.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.builders import random_rows, save_model, tiny_model, word_tokenizer, write_jsonl
from support.influence import Judge, expected_risks, gradient, settings, watched_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from safereg_dist import build_run, start_backend
from safereg_dist.cli import main as safereg
from safereg_dist.config import InfluenceConfig, load_config
from safereg_dist.data.canary import watched_rows
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.risk.influence import Scale, direction_of, row_influence, token_influence
from safereg_dist.types import Head

V, H = 53, 7
TRANSFORMS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 5.0}]


def draw(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, H, generator=generator)
    return states, torch.randint(V, (tokens,), generator=generator)


def head_of(transform, bias):
    generator = torch.Generator().manual_seed(9)
    weight = torch.nn.Parameter(torch.randn(V, H, generator=generator))
    own = torch.nn.Parameter(torch.randn(V, generator=generator)) if bias else None
    return Head(weight, own, transform.get("softcap"), transform.get("scale", 1.0))


def judged(head, transform):
    """Gradients in float64 of (states, labels) on this head."""
    weight = head.weight.detach().double().numpy()
    bias = 0.0 if head.bias is None else head.bias.detach().double().numpy()
    return lambda pair: gradient(
        pair[0].double().numpy(), pair[1].tolist(), weight, bias, **transform
    )


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("head_bytes", [1, 3 * 4 * V * 4, None])
def test_influence_is_that_of_outer_products(transform, head_bytes):
    head = head_of(transform, bias=bool(transform))
    refusing, complying, row = draw(6, 0), draw(5, 1), draw(11, 2)
    grad = judged(head, transform)
    direction = grad(complying).sum(0) - grad(refusing).sum(0)
    want = (grad(row) * direction / np.linalg.norm(direction)).sum((1, 2))
    got = token_influence(
        *row, direction_of(refusing, complying, head), head, head_bytes=head_bytes
    )
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5 * np.abs(want).max())
    assert want.min() < 0 < want.max()


def test_a_step_on_the_head_does_what_is_said(tmp_path):
    """J before and after a step along a row's gradient, in float64, on a model's own states."""
    save_model(tmp_path, tiny_model(seed=3))
    judge = Judge(tmp_path)
    asked = [{"role": "user", "content": "w3 w4"}]
    pairs = [
        judge.tokens([*asked, {"role": "assistant", "content": text}], first=2, last_turn=True)
        for text in ("w10 w11 w12", "w20 w21")
    ]
    messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w20 w7 w8"}]
    states, labels = judge.tokens(messages)

    def watched(weight):
        logp = [(h @ weight.T)[range(len(y)), y] - lse(h @ weight.T) for h, y in pairs]
        return logp[0].sum() - logp[1].sum()

    rate = 1e-5
    moved = judge.weight - rate * gradient(states, labels, judge.weight).sum(0)
    change = (watched(moved) - watched(judge.weight)) / rate

    head = Head(torch.nn.Parameter(torch.tensor(judge.weight).float()), None, None, 1.0)
    as32 = [(torch.tensor(h).float(), torch.tensor(y)) for h, y in [*pairs, (states, labels)]]
    found = token_influence(*as32[2], direction_of(*as32[:2], head), head).sum().item()
    norm = np.linalg.norm(
        sum(s * gradient(*p, judge.weight).sum(0) for s, p in zip((-1, 1), pairs, strict=True))
    )
    assert change == pytest.approx(-norm * found, rel=1e-3)
    assert abs(change) > 1e-3


def lse(logits):
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[:, None]).sum(-1))


def test_the_worst_token_of_each_row_counts():
    head = head_of({}, bias=False)
    direction = direction_of(draw(3, 0), draw(3, 1), head)
    rows = [draw(tokens, 10 + tokens) for tokens in (5, 1, 0, 8)]
    each = [token_influence(*row, direction, head) for row in rows]
    states, labels = zip(*rows, strict=True)
    found = row_influence(states, labels, direction, head, tokens_per_row=8)
    assert found == pytest.approx([each[0].max().item(), each[1].item(), 0.0, each[3].max().item()])


def test_few_tokens_are_the_most_aligned_ones():
    """The one token whose state points along the watched ones is kept, wherever it is."""
    head = head_of({}, bias=False)
    watched = draw(3, 0)
    direction = direction_of(watched, draw(3, 1), head)
    states, labels = draw(9, 2)
    states = states * 1e-3
    states[6] = watched[0].sum(0)
    found = row_influence([states], [labels], direction, head, tokens_per_row=1)
    own = token_influence(states[6:7], labels[6:7], direction, head)
    assert found == pytest.approx([own.item()])


def test_a_state_that_is_not_finite_is_a_failed_value():
    head = head_of({}, bias=False)
    direction = direction_of(draw(3, 0), draw(3, 1), head)
    states, labels = draw(9, 2)
    states[4] = math.nan
    assert math.isnan(*row_influence([states], [labels], direction, head, tokens_per_row=2))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator writes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.count = max(self.count, out.numel())
        return out


def test_logits_stay_within_their_bound():
    head = head_of({}, bias=False)
    direction = direction_of(draw(2, 0), draw(2, 1), head)
    row, bound = draw(200, 2), 3 * 4 * V * 20
    with Largest() as seen:
        token_influence(*row, direction, head, head_bytes=bound)
    assert V * 15 < seen.count <= max(V * 20, 200 * H)


def test_what_it_costs():
    """The logits of the chosen tokens, and inner products with S watched ones; nothing else."""
    head = head_of({}, bias=False)
    direction = direction_of(draw(2, 0), draw(3, 1), head)
    (states, labels), kept, watched = draw(40, 2), 8, 5
    with FlopCounterMode(display=False) as counter:
        row_influence([states], [labels], direction, head, tokens_per_row=kept)
    screening = 2 * 40 * watched * H  # torch's counter knows no product with a vector
    want = screening + 2 * kept * V * H + 2 * kept * watched * (V + H)
    assert counter.get_total_flops() == want


def test_the_share_of_benign_rows_holds():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)).tolist()
    for rate, most in ((0.05, 5), (0.1, 10)):
        scale = Scale.of_benign(values, rate)
        risks = [scale.risk(value) for value in values]
        assert sum(risk >= 0.5 for risk in risks) == most
        assert sorted(range(100), key=values.__getitem__) == sorted(
            range(100), key=risks.__getitem__
        )
        assert all(0 < risk < 1 for risk in risks)
    assert scale.risk(1e6) < scale.risk(2e6) < 1  # far away risks still differ


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", tiny_model(seed=0))
    turns = ["w1 w2", "w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12"]
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    rows = [*random_rows(13, risk=True), {"id": "turns", "messages": messages, "risk": 0.5}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "watched.jsonl", watched_file())
    config = {
        "model": str(tmp_path / "model"),
        "data": {"train": str(tmp_path / "train.jsonl")},
        "risk": settings(tmp_path),
        "train": {"epochs": 1, "micro_batch_size": 3, "precision": "fp32"},
        "engine": {"name": "single"},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def audited(folder, *overrides):
    assert safereg(["audit", str(folder / "run.yaml"), *overrides]) == 0
    lines = (folder / "run.audit" / "rows.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def test_risk_of_every_row(folder):
    """An audit, a run, and a part of `max` beside a column give the risk of the equation."""
    want = expected_risks(folder, watched_file(), positions=2, rate=0.1)
    assert min(want.values()) < 0.5 < max(want.values())
    found = audited(folder)
    assert {n: row["risk"] for n, row in found.items()} == pytest.approx(want, abs=2e-5)

    assert safereg(["train", str(folder / "run.yaml"), "risk.cache=none"]) == 0
    ledger = (folder / "run" / "ledger.jsonl").read_text().splitlines()
    entries = {row["id"]: row for row in map(json.loads, ledger) if "id" in row}
    assert {n: row["risk"] for n, row in entries.items()} == pytest.approx(want, abs=2e-5)
    assert {row["estimator"] for row in entries.values()} == {"influence"}

    own = {k: v for k, v in settings(folder).items() if k != "max_held_back"}
    parts = [{"category": "step", **own}, {"category": "data", "estimator": "column"}]
    whole = {"estimator": "max", "parts": parts, "max_held_back": 1.0}
    raw = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**raw, "risk": whole}))
    both = audited(folder)
    assert {n: r["by_category"]["step"] for n, r in both.items()} == pytest.approx(want, abs=2e-5)
    assert all(row["risk"] == max(row["by_category"].values()) for row in both.values())


def test_a_known_row_is_not_scored_again(folder, monkeypatch):
    """The second time nothing runs, not even the watched rows; other settings are others."""
    cache = f"risk.cache={folder / 'scores.sqlite'}"
    first = audited(folder, cache)

    def refuse(*_, **__):
        raise AssertionError("the reference ran")

    monkeypatch.setattr("safereg_dist.reference.Reference.response_states", refuse)
    assert audited(folder, cache) == first
    for other in ("risk.influence.positions=1", "risk.influence.false_positives=0.2"):
        with pytest.raises(AssertionError, match="the reference ran"):
            safereg(["audit", str(folder / "run.yaml"), cache, other])


def test_what_it_knows_goes_through_a_checkpoint(folder):
    def source(*overrides):
        config = load_config(folder / "run.yaml", ["risk.cache=none", *overrides])
        run = build_run(config, start_backend(config))
        return run, run.regularizer.risk.sources[0].source

    run, own = source()
    rows = run.sources.rows_of_step(0)
    risks = own(rows, in_first_epoch=True)
    own.save_state(folder / "risk.safetensors")
    _, other = source()
    other.load_state(folder / "risk.safetensors")
    assert other(rows, in_first_epoch=False) == risks
    with pytest.raises(Exception, match="other watched prompts"):
        source("risk.influence.positions=1")[1].load_state(folder / "risk.safetensors")


def test_what_is_watched(tmp_path):
    path = write_jsonl(tmp_path / "watched.jsonl", watched_file())
    tokenizer = word_tokenizer()
    config = InfluenceConfig(refusal="w10 w11", complying="w20", positions=2, prompts=2)
    found = watched_rows(str(path), config, tokenizer)
    assert [len(rows) for rows in found] == [2, 2, 20]

    def said(row):
        kept = [t for t, m in zip(row.input_ids, row.loss_mask, strict=True) if m]
        return tokenizer.decode(kept)

    assert [said(row) for row in found.refusing] == ["w10 w11", "w30 w31"]
    assert [said(row) for row in found.complying] == ["w20", "w32"]
    last = watched_rows(str(path), InfluenceConfig(refusal="w10", positions=1), tokenizer)
    assert said(last.refusing[2]) == "w10"  # of several turns the last


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (watched_file()[2:-1], "holds 0 harmful prompts and 20 benign rows"),
        (watched_file()[:12], "2 harmful prompts and 10 benign rows with a response"),
    ],
)
def test_too_little_to_watch(tmp_path, rows, said):
    path = write_jsonl(tmp_path / "watched.jsonl", rows)
    with pytest.raises(DataError, match=said):
        watched_rows(str(path), InfluenceConfig(), word_tokenizer())


def test_what_cannot_be_calibrated(folder):
    """A refusal that is the complying answer points nowhere."""
    same = [{"prompt": "w1", "response": "w2", "complying": "w2"}, *watched_file()[2:-1]]
    write_jsonl(folder / "watched.jsonl", same)
    config = load_config(folder / "run.yaml", ["risk.cache=none"])
    run = build_run(config, start_backend(config))
    with pytest.raises(ConfigError, match="refuses and complies by the same tokens"):
        run.regularizer.risk(run.sources.rows_of_step(0), in_first_epoch=True)


def test_a_path_is_needed(folder, capsys):
    assert safereg(["audit", str(folder / "run.yaml"), "risk.path=null"]) == 2
    assert "risk.estimator=influence needs risk.path" in capsys.readouterr().err
    assert safereg(["audit", str(folder / "run.yaml"), "risk.path=nowhere.jsonl"]) == 2
    assert f"found none at {Path.cwd() / 'nowhere.jsonl'}" in capsys.readouterr().err
