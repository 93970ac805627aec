"""What ranks agree on, fail with and hand to one another: forked processes, gloo, no launcher.

Exact: who raises what, in which order numbers come, which rows run where. Rounds: states of a row
that ran beside others (1e-5).
"""

import pytest
import torch
from support.builders import tiny_model
from support.ranks import ALONE, on_ranks

from safereg_dist.errors import DataError
from safereg_dist.parallel.comm import Result, capture
from safereg_dist.parallel.hardware import Rates
from safereg_dist.parallel.single import SingleBackend
from safereg_dist.reference import EngineModel, Exchange, Packing, Reference, exchange
from safereg_dist.reference.exchange import Lent, even_moves, slowest_rates
from safereg_dist.reference.trunk import used_parameters
from safereg_kernels import TopK, vocab_parallel_linear_ce_kl


def raised(action):
    """Name and text of what an action raises, or nothing."""
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def test_numbers_that_ranks_agree_on(tmp_path):
    def work(ranks):
        own = Result([ranks.rank, 7 - ranks.rank])
        ranks.raise_if_any_failed(own)
        return [
            ranks.all_reduce_max_async(own, count=2).result(),
            ranks.all_gather_async(own, count=2).result(),
            ranks.max_over_ranks(Result(ranks.rank % 2)),
            ranks.total(1 + ranks.rank).item(),
            ranks.sum_(torch.tensor([1.0 + ranks.rank])).tolist(),
            ranks.gather(torch.tensor([ranks.rank, -ranks.rank])).tolist(),
        ]

    expected = [[2, 7], [0, 7, 1, 6, 2, 5], 1, 6.0, [6.0], [[0, 0], [1, -1], [2, -2]]]
    assert on_ranks(3, work, tmp_path) == [expected] * 3
    assert ALONE.all_reduce_max_async(Result([3, 4]), count=2).result() == [3, 4]
    assert (ALONE.total(5).item(), ALONE.total(5).dtype) == (5.0, torch.float32)
    ALONE.raise_if_any_failed(Result("anything"))
    for agree in (ALONE.max_over_ranks, ALONE.raise_if_any_failed):
        with pytest.raises(DataError, match="alone"):
            agree(Result(error=DataError("alone")))


def test_the_first_rank_that_fails_speaks_for_all(tmp_path):
    """Afterwards the ranks are still in step: their next sum is right."""

    def work(ranks):
        rank = ranks.rank
        own = {1: DataError("a bad row"), 2: KeyError("later")}.get(rank)
        number, numbers = Result(rank, own), Result([rank, 0], own)
        seen = [
            raised(lambda: ranks.max_over_ranks(number)),
            raised(lambda: ranks.raise_if_any_failed(number)),
            raised(lambda: ranks.all_gather_async(numbers, count=2).result()),
            raised(lambda: ranks.raise_together(own)),
            raised(lambda: ranks.raise_together(None)),
            raised(lambda: ranks.raise_together(DataError("mine") if rank == 0 else None)),
        ]

        def block():
            with ranks.together():
                if rank == 2:
                    raise ValueError("odd")

        seen.append(raised(block))
        return [*seen, ranks.sum_(torch.tensor([1.0])).tolist()]

    first, second, third = on_ranks(3, work, tmp_path)
    told = ["DataError", "rank 1: a bad row"]
    for told_of, kept in ((first, False), (second, True), (third, False)):
        assert told_of[:4] == [["DataError", "a bad row"] if kept else told] * 4
        assert told_of[4:6] == [[], ["DataError", "mine"]]
        assert told_of[7] == [3.0]
    assert third[6] == ["ValueError", "odd"]
    for name, text in (first[6], second[6]):
        assert name == "RemoteRankError"
        assert text.startswith("rank 2: ValueError: odd at ")
        assert "test_ranks.py:" in text


def test_a_result_is_a_value_or_an_error():
    good, bad = capture(int, "7"), capture(int, "seven")
    assert (good.value, good.error, good.or_else(0)) == (7, None, 7)
    assert (type(bad.error), bad.or_else(0)) == (ValueError, 0)
    with pytest.raises(ValueError, match="seven"):
        _ = bad.value
    assert good.then(lambda number, more: number + more, more=2).value == 9
    later = good.then(lambda number: number / 0)
    assert type(later.error) is ZeroDivisionError
    assert bad.then(lambda number: number / 0).error is bad.error
    assert capture(lambda: None).value is None


@pytest.mark.parametrize(
    ("counts", "most", "moved"),
    [
        ([5, 0, 1], 2, 3),
        ([0, 0, 7], 3, 4),
        ([2, 2, 2], 2, 0),
        ([0, 4], 2, 2),
        ([3, 4, 3], 4, 0),
        ([5, 5, 0, 2], 3, 4),
    ],
)
def test_moves_even_out_with_the_fewest_rows(counts, most, moved):
    moves = even_moves(counts)
    after = [n - sum(moves[i]) + sum(row[i] for row in moves) for i, n in enumerate(counts)]
    assert sum(after) == sum(counts)
    assert max(after) == most
    assert max(after) - min(after) <= 1
    assert sum(map(sum, moves)) == moved
    assert all(n >= 0 for row in moves for n in row)


def some_rows(rank):
    """One row on rank 0, none on rank 1, five on rank 2; of unlike length, with gaps."""
    rows = []
    for index in range((1, 0, 5)[rank]):
        ids = [(7 * rank + 3 * index + t) % 90 + 6 for t in range(4 + (3 * index) % 5)]
        rows.append(Lent(ids, [0, 1, *(int(t % 2 == index % 2) for t in range(2, len(ids)))]))
    return rows


@pytest.mark.parametrize("pays", [True, False])
def test_rows_that_others_run_come_back_to_their_owner(tmp_path, pays):
    model = tiny_model(num_hidden_layers=1).eval()

    def work(ranks):
        packing = Packing(rows_per_pass=2 if pays else 8)
        own = EngineModel.of_model(
            model, backend=SingleBackend(ranks), offload="none", rows=packing.rows_per_pass
        )
        reference = Reference(own, ranks=ranks, packing=packing)
        rates = (1.0, 1e30) if pays else (1e30, 1.0)
        handed = Exchange(
            ranks=ranks,
            rates=Rates(flops_per_s=rates[0], link_bytes_per_s=rates[1]),
            trunk_parameters=used_parameters(model),
            head=own.head,
            rows_per_pass=packing.rows_per_pass,
        )
        states, rows_run = handed.states(some_rows(ranks.rank), reference.response_states)
        rates_of_all = slowest_rates(ranks)
        return [[s.tolist() for s in states], rows_run, rates_of_all.link_bytes_per_s]

    found = on_ranks(3, work, tmp_path)
    assert [rows_run for _, rows_run, _ in found] == ([2, 2, 2] if pays else [1, 0, 5])
    assert len({link for *_, link in found}) == 1
    for rank, (states, *_) in enumerate(found):
        for row, own in zip(some_rows(rank), states, strict=True):
            with torch.no_grad():
                hidden = model.base_model(torch.tensor([row.input_ids])).last_hidden_state[0]
            at = [t - 1 for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
            torch.testing.assert_close(torch.tensor(own), hidden[at], rtol=1e-5, atol=1e-5)


def test_rates_are_those_of_the_slowest_rank(tmp_path, monkeypatch):
    """Each rate by itself, so that all ranks decide alike."""

    def work(ranks):
        own = Rates(flops_per_s=(3.0, 2.0)[ranks.rank], link_bytes_per_s=(5.0, 7.0)[ranks.rank])
        monkeypatch.setattr(exchange, "rates_of_device", lambda name, spans_nodes: own)
        found = slowest_rates(ranks)
        return [found.flops_per_s, found.link_bytes_per_s]

    assert on_ranks(2, work, tmp_path) == [[2.0, 5.0]] * 2


def teacher_inputs():
    """Hidden states, head, labels, and a teacher of three of eleven tokens for each row."""
    generator = torch.Generator().manual_seed(8)
    hidden, head = torch.randn(4, 3, generator=generator), torch.randn(11, 3, generator=generator)
    ids = torch.tensor([[0, 4, 5], [5, 10, 2], [6, 7, 9], [1, 4, 3]])
    topk = TopK(ids=ids, logits=torch.randn(4, 3, generator=generator))
    options = {
        "ce_weights": torch.tensor([0.5, 0.0, 2.0, 1.0]),
        "kl_weights": torch.tensor([1.0, 3.0, 0.0, 2.0]),
        "reference_topk": topk,
    }
    return hidden.requires_grad_(), head, torch.tensor([4, 5, 0, 10]), options


def test_a_teacher_of_a_few_tokens_over_two_shards(tmp_path):
    """Columns 0 to 4 and 5 to 10: a teacher's tokens lie on either rank, on both, or at an edge."""

    def work(ranks):
        hidden, head, labels, options = teacher_inputs()
        begin, end = ((0, 5), (5, 11))[ranks.rank]
        own = head[begin:end].clone().requires_grad_()
        loss, ce, divergence = vocab_parallel_linear_ce_kl(
            hidden, own, labels, tp_group=ranks.dp_group, vocab_start=begin, **options
        )[:3]
        loss.backward()
        return [t.tolist() for t in (loss, ce, divergence, hidden.grad, own.grad)]

    first, second = on_ranks(2, work, tmp_path)
    hidden, head, labels, options = teacher_inputs()
    log_p = (hidden @ head.requires_grad_().T).log_softmax(-1)
    ids, logits = options["reference_topk"]
    log_q = logits.log_softmax(-1)
    want_ce = -log_p.gather(1, labels[:, None])[:, 0] * (options["ce_weights"] != 0)
    want = (log_q.exp() * (log_q - log_p.gather(1, ids))).sum(-1) * (options["kl_weights"] != 0)
    loss = (options["ce_weights"] * want_ce + options["kl_weights"] * want).sum()
    loss.backward()
    for found in (first, second):
        parts = zip(found[:4], (loss, want_ce, want, hidden.grad), strict=True)
        for got, expected in parts:
            torch.testing.assert_close(torch.tensor(got), expected.detach(), rtol=1e-5, atol=1e-5)
    of_head = torch.tensor([*first[4], *second[4]])
    torch.testing.assert_close(of_head, head.grad, rtol=1e-5, atol=1e-5)
