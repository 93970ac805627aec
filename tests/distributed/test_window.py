"""Claimed: risky rows of a whole accumulation window share the reference's passes, dealt or handed
over to ranks that have fewer, and the step is still the step of the equations, on 1 to 4 ranks; it
never hangs; without risk it costs 8 bytes.

Judges: float64 equations (`step_judge`), and plain transformers with full logits of both models for
every row, padded as micro-batches are. Exact: the order of collectives, rows run, bytes, what an
epoch holds. Rounds: float32 arithmetic of the model (1e-5 of the largest entry of each gradient and
of each row's CE and divergence).
"""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from step_judge import coefficient, expected, rows_of_step, whole_models
from support.builders import random_rows, save_model, tiny_model, word_tokenizer, write_jsonl
from support.launching import ROOT
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM
from window_cases import (
    DEAL,
    LOPSIDED,
    QUIET,
    RANDOM,
    RANDOM_STEPS,
    ROWS_PER_MICRO_BATCH,
    equal_on,
    random_rows_of_rank,
    rows_of_rank,
)

from safereg_dist.data import Sampler
from safereg_dist.data.tokenized import tokenize_row

WORKER = ROOT / "tests" / "distributed" / "window_worker.py"
TOLERANCE = 1e-5
FILE_ROWS = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Policy, reference, rows and configuration on disk."""
    base = tmp_path_factory.mktemp("window")
    for name, seed in (("policy", 0), ("reference", 1)):
        save_model(base / name, tiny_model(seed=seed, num_hidden_layers=2))
        save_model(base / f"small-{name}", tiny_model(seed=seed, num_hidden_layers=1))
    write_jsonl(base / "train.jsonl", file_rows())
    (base / "base.yaml").write_text(
        "model: policy\n"
        "reference: {model: reference}\n"
        f"data: {{train: {base / 'train.jsonl'}}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "regularizer: {schedule: linear}\n"
        f"train: {{precision: fp32, micro_batch_size: {ROWS_PER_MICRO_BATCH}, chunk_tokens: 7}}\n"
        "optimizer: {max_grad_norm: 0}\n"
        f"output_dir: {base / 'out'}\n"
    )
    return base


def file_rows():
    """Rows of which four are risky."""
    rows = random_rows(FILE_ROWS)
    return [{**row, "risk": 0.9 if i in (1, 2, 5, 9) else 0.0} for i, row in enumerate(rows)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4], ids="{}-ranks".format)
@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_window_equals_the_equations(world_size, folder, launch, tmp_path):
    for file in ("policy", "reference", "small-policy", "small-reference", "base.yaml"):
        (tmp_path / file).symlink_to(folder / file)
    done = launch(WORKER, str(tmp_path), ranks=world_size)
    assert done.status == 0, done.output[-4000:]
    models = whole_models(folder)
    for case in equal_on(world_size):
        check_equal(case, Facts(tmp_path, case, world_size), models)
        check_always_on(case, Facts(tmp_path, case, world_size), folder)
    if world_size == 3:
        check_dealt(Facts(tmp_path, DEAL, world_size), models)
    if world_size == 4:
        check_lopsided(Facts(tmp_path, LOPSIDED, world_size))
        check_quiet([Facts(tmp_path, case, world_size) for case in QUIET])
        for case in RANDOM:
            check_random(case, Facts(tmp_path, case, world_size))


class Facts:
    """What the ranks of one case wrote."""

    def __init__(self, folder, case, world_size) -> None:
        self.folder, self.world_size = folder / f"{case.name}-{world_size}", world_size
        self.where = f"{case.name} on {world_size} ranks"

    def of(self, name):
        """A fact of every rank, in rank order."""
        files = [self.folder / f"{name}.rank{rank}.json" for rank in range(self.world_size)]
        return [json.loads(file.read_text()) for file in files]

    def tokens(self):
        """(ce, divergence) of every row by its id, from whichever rank had it."""
        return {row: parts for rank in self.of("tokens") for row, parts in rank.items()}

    def check_order(self):
        """Every rank made the same collectives, and nothing is left gathered."""
        first, *others = self.of("collectives")
        assert len(first) > 10, self.where
        assert all(other == first for other in others), f"{self.where}: other collectives"
        assert self.of("left") == [[]] * self.world_size, self.where


def check_equal(case, facts, models):
    rows = rows_of_step(case, facts.world_size)
    result, grads, counts = expected(case, rows, models)
    (row,) = [json.loads(s) for s in (facts.folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "task_loss", "divergence"):
        assert row[name] == pytest.approx(result[name], rel=TOLERANCE), (facts.where, name)
    for name, count in counts.items():
        assert row[name] == count, (facts.where, name)
    check_tokens(facts, rows, result)
    check_grads(facts, grads)
    facts.check_order()
    assert sum(facts.of("rows_run")) == counts["reference_rows"], facts.where
    check_exchanges(case, facts)


def check_exchanges(case, facts):
    """Rows go and states return once for the rows kept at once, where that evens out ranks."""
    made = sum("all_to_all" in entry for entry in facts.of("collectives")[0])
    if case.balance != "exchange" or not case.pays:
        assert made == 0, facts.where
        return
    active = [
        sum(coefficient(case, row) > 0 for row in rows_of_rank(case, rank))
        for rank in range(facts.world_size)
    ]
    kept = len(rows_of_rank(case, 0)) if case.keep_bytes else ROWS_PER_MICRO_BATCH
    uneven = 0
    for begin in range(0, len(rows_of_rank(case, 0)), kept):
        counts = [min(max(count - begin, 0), kept) for count in active]  # active rows come first
        uneven += max(counts) > math.ceil(sum(counts) / len(counts))
    assert made == 2 * uneven, (facts.where, active)
    if case.keep_bytes:
        check_even(facts)


def check_tokens(facts, rows, result):
    """CE and divergence of every token of every row."""
    tokens = facts.tokens()
    assert set(tokens) == {row.id for row in rows}, facts.where
    for index, row in enumerate(rows):
        at = result["row_of_token"] == index
        for name, want, got in zip(
            ("CE", "D"), (result["ce"][at], result["div"][at]), tokens[row.id], strict=True
        ):
            assert len(want) == len(got) == sum(row.loss_mask), (facts.where, row.id)
            scale = max(np.abs(want).max(initial=0), 1e-6)
            worst = np.abs(np.array(got) - want).max(initial=0) / scale
            assert worst < TOLERANCE, f"{facts.where}: {name} of {row.id} is off by {worst:.2e}"


def check_grads(facts, grads):
    measured = np.load(facts.folder / "grads.npz")
    assert set(measured) == set(grads), facts.where
    for name, grad in grads.items():
        scale = np.abs(grad).max()
        assert scale > 0, (facts.where, name)
        worst = np.abs(measured[name] - grad).max() / scale
        assert worst < TOLERANCE, f"{facts.where}: gradient of {name} is off by {worst:.2e}"


def check_even(facts):
    """The slowest rank ran at most one row more than the mean."""
    run = facts.of("rows_run")
    assert max(run) <= sum(run) / len(run) + 1, (facts.where, run)


def check_always_on(case, facts, folder):
    """The same step with the reference on every row of every micro-batch, and full logits."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("policy", "reference")
    )
    rows = rows_of_step(case, facts.world_size)
    num_tokens, loss = sum(sum(row.loss_mask) for row in rows), 0.0
    for rank in range(facts.world_size):
        own = rows_of_rank(case, rank)
        for begin in range(0, len(own), ROWS_PER_MICRO_BATCH):
            micro_batch = own[begin : begin + ROWS_PER_MICRO_BATCH]
            part = full_logits_loss(case, micro_batch, policy, reference) / num_tokens
            part.backward()
            loss += float(part.detach())
    (row,) = [json.loads(s) for s in (facts.folder / "metrics.jsonl").read_text().splitlines()]
    assert row["loss"] == pytest.approx(loss, rel=TOLERANCE), facts.where
    check_grads(facts, {n: p.grad.numpy() for n, p in policy.named_parameters()})


def full_logits_loss(case, rows, policy, reference):
    """sum_t (1 - b) CE_t + b KL_t of padded rows, from the logits of all positions."""
    width = max(len(row.input_ids) for row in rows)
    ids, attended, learned = torch.zeros(3, len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length] = torch.tensor(row.input_ids)
        attended[index, :length] = 1
        learned[index, :length] = torch.tensor(row.loss_mask)
    logits = policy(input_ids=ids, attention_mask=attended).logits[:, :-1]
    with torch.no_grad():
        target = reference(input_ids=ids, attention_mask=attended).logits[:, :-1]
    ce = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    own, other = log_softmax(logits, -1), log_softmax(target, -1)
    divergence = kl_div(own, other, reduction="none", log_target=True).sum(-1)
    b = torch.tensor([[coefficient(case, row)] for row in rows])
    return (((1 - b) * ce + b * divergence) * learned[:, 1:]).sum()


def check_dealt(facts, models):
    """Each epoch holds each row once; the rows' parts are those of the equations."""
    facts.check_order()
    length = math.ceil(FILE_ROWS / facts.world_size)
    every_row = sorted(row["id"] for row in file_rows())
    for epoch in range(2):
        span = slice(epoch * length, (epoch + 1) * length)
        seen = [row for ids in facts.of("ids") for row in ids[span] if row is not None]
        assert sorted(seen) == every_row, epoch
    rows = [tokenize_row(raw, raw["id"], word_tokenizer(), default_id="") for raw in file_rows()]
    result, _, _ = expected(DEAL, rows, models)
    check_tokens(facts, rows, result)
    run = facts.of("rows_run")
    assert sum(run) == 2 * 4  # four risky rows, two epochs
    assert max(run) - min(run) <= 1, run


def check_lopsided(facts):
    """Eight risky rows on rank 0 and none elsewhere: two on each of four ranks."""
    facts.check_order()
    assert facts.of("rows_run") == [2, 2, 2, 2]


def check_quiet(all_facts):
    """Beyond plain fine-tuning one agreement on a window of three micro-batches, and no forward."""
    plain, routed, exchanged = (Counter(map(tuple, f.of("sent")[0])) for f in all_facts)
    assert routed - plain == Counter({("all_reduce:1", 8): 1})
    assert exchanged - plain == Counter({("all_reduce:1", 8): 1})  # no row to run, no counts
    assert not plain - routed
    assert not plain - exchanged
    for facts in all_facts:
        facts.check_order()
        assert facts.of("forwards") == [0] * facts.world_size, facts.where
        assert facts.of("rows_run") == [0] * facts.world_size, facts.where


def check_random(case, facts):
    """Nothing hung, one order of collectives to the end, and the failure reached every rank."""
    facts.check_order()
    caught = facts.of("caught")
    assert all("the risk of rank 1 broke" in text for text in caught), caught
    patterns = [
        [random_rows_of_rank(case, rank, step) for rank in range(facts.world_size)]
        for step in range(RANDOM_STEPS[case.grad_accum_steps])
    ]
    risky = [
        [sum(row.risk > 0 and any(row.loss_mask) for row in rows) for rows in step]
        for step in patterns
    ]
    assert any(max(step) == 0 for step in risky)
    assert any(min(step) == 0 < max(step) for step in risky)
    assert any(not any(any(r.loss_mask) for r in rows) for step in patterns for rows in step)
    assert sum(facts.of("rows_run")) == sum(map(sum, risky)), facts.where


@pytest.mark.parametrize(("num_rows", "num_active"), [(23, 7), (24, 8), (9, 1), (40, 37), (11, 0)])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_deal_is_even_in_every_step_of_every_epoch(num_rows, num_active, world_size):
    draw = np.random.default_rng([num_rows, world_size])
    active = draw.permutation(num_rows) < num_active
    rows_per_step, epochs = 3, 4
    streams = [dealt_stream(active, rank, world_size) for rank in range(world_size)]
    length = math.ceil(num_rows / world_size)
    table = [[s.row(p) for p in range(epochs * length)] for s in streams]
    for epoch in range(epochs):
        span = slice(epoch * length, (epoch + 1) * length)
        seen = [row for own in table for row in own[span] if row is not None]
        assert sorted(seen) == list(range(num_rows)), epoch
    for begin in range(0, epochs * length, rows_per_step):
        step = [own[begin : begin + rows_per_step] for own in table]
        counts = [sum(row is not None and active[row] for row in own) for own in step]
        assert max(counts) <= sum(counts) / world_size + 1, (begin, counts)
    orders = {tuple(table[0][e * length : (e + 1) * length]) for e in range(epochs)}
    assert len(orders) == epochs or length < 4, "epochs repeat one another"
    # Resumed in the middle of an epoch, and in another process.
    middle = length + length // 2
    resumed = dealt_stream(active, 0, world_size)
    assert [resumed.row(p) for p in range(middle, epochs * length)] == table[0][middle:]


class Numbers:
    """Rows that are their own numbers."""

    def __init__(self, count) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def row(self, index):
        """The index."""
        return index


def dealt_stream(active, rank, world_size):
    """The stream of one rank."""
    return Sampler(
        Numbers(len(active)),
        None,
        anchor_fraction=0.0,
        rank=rank,
        world_size=world_size,
        seed=5,
        epochs=None,
        active=active,
    )
