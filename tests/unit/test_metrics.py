"""Claimed: a step's metrics and ledger rows are the sums and means one would write by hand.

Exact but for the float64 sums of float32 losses (1e-6).
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.ranks import ALONE, on_ranks

from safereg_dist.data import collate, filler
from safereg_dist.metrics import StepMetrics
from safereg_dist.run.metrics import MetricsWriter
from safereg_dist.types import Loss, MicroBatchResult, Row, RowRisks


def row(name, tokens, *, anchor=False):
    return Row(
        id=name,
        input_ids=[1] * (2 + tokens),
        loss_mask=[0, 0, *[1] * tokens],
        prompt_ends=[2],
        risk=None,
        prompt_key="",
        is_anchor=anchor,
    )


def result(batch, loss, risks, coefs, *, ran, missed):
    """CE of token t is t + 1 on rows that are no anchors, its divergence 10 (t + 1) where b > 0."""
    places = batch.row_of_token.tolist()
    ce = [0.0 if batch.rows[r].is_anchor else t + 1.0 for t, r in enumerate(places)]
    divergence = [10.0 * (t + 1) if coefs[r] > 0 else 0.0 for t, r in enumerate(places)]
    sources = ["test"] * len(batch.rows)
    return MicroBatchResult(
        Loss(torch.tensor(loss), torch.tensor(ce), torch.tensor(divergence)),
        RowRisks(risks, {}, sources, {0: "seen"}, {1: "named"}),
        coefs,
        ran,
        missed,
    )


def a_step():
    metrics = StepMetrics(threshold=0.5)
    first = collate([row("a", 2), row("b", 3), filler(0)], pad_id=0)
    metrics.add(first, result(first, 1.5, [0.25, math.nan, None], [0.0, 0.5, 0.0], ran=1, missed=1))
    second = collate([row("c", 1, anchor=True), row("d", 1), filler(0)], pad_id=0)
    risks = [None, 0.5, None]
    metrics.add(second, result(second, 0.25, risks, [1.0, 0.75, 0.0], ran=2, missed=0))
    return metrics


def test_a_first_token_is_not_counted_though_a_stack_labels_it():
    """The mean of what is predicted: TRL labels whole conversations."""
    metrics = StepMetrics()
    whole = replace(row("a", 2), loss_mask=[1] * 4, prompt_ends=[0])
    batch = collate([whole], pad_id=0)
    metrics.add(batch, result(batch, 2.0, [None], [0.0], ran=0, missed=0))
    totals = metrics.reduce(ALONE, step=0, flags={}, risk_sums={})
    found = totals.metrics_row(step=0, lr=0.1, grad_norm=2.0, step_time_s=4.0)
    assert (found["response_tokens"], found["task_loss"]) == (3, 2.0)  # of 1, 2, 3


def test_sums_and_rows_of_a_step():
    metrics = a_step()
    ranks = replace(ALONE, rank=2)
    flags = {"stop_requested": False, "log_failed": True}
    totals = metrics.reduce(ranks, step=7, flags=flags, risk_sums={"risky": 3.0})
    assert totals.sums["risky"] == 3.0
    assert totals.flags == flags
    assert not flags.keys() & totals.sums.keys()
    found = totals.metrics_row(step=7, lr=0.1, grad_norm=2.0, step_time_s=4.0)
    assert found.pop("peak_memory_bytes") > 1e6
    assert found == pytest.approx(
        {
            "step": 7,
            "loss": 1.75,
            "task_loss": (1 + 2 + 3 + 4 + 5 + 2) / 6,  # 5 tokens of a and b, 1 of d
            "divergence": (30 + 40 + 50 + 10 + 20) / 5,  # of b, c and d
            "kl_coef_mean": (0.5 + 1.0 + 0.75) / 4,
            "kl_coef_max": 1.0,
            "risk_mean": (0.25 + 1.0 + 0.5) / 3,  # a failed risk counts as 1
            "risk_max": 1.0,
            "risky_fraction": 2 / 3,  # the failed one, and the one at the threshold
            "rows": 4,
            "active_rows": 3,
            "reference_rows": 3,
            "response_tokens": 7,
            "active_tokens": 5,
            "grad_norm": 2.0,
            "lr": 0.1,
            "tokens_per_s": (4 + 5 + 3 + 3) / 4,
            "step_time_s": 4.0,
        }
    )
    assert totals.sums["reference_misses"] == 1.0
    assert totals.risk_metrics == {}
    said = totals._replace(risk_metrics={"risk_failed": 3})
    assert said.metrics_row(step=7, lr=0.1, grad_norm=2.0, step_time_s=4.0)["risk_failed"] == 3
    rows = totals.ledger_rows
    assert [(r.micro_batch, r.row, r.id, r.estimator, r.divergence) for r in rows] == [
        (0, 0, "a", "test", None),
        (0, 1, "named", "test", 40.0),
        (1, 0, "c", "anchor", 10.0),
        (1, 1, "named", "test", 20.0),
    ]
    assert [(r.note, r.kl_coef, r.step, r.rank) for r in rows] == [
        ("seen", 0.0, 7, 2),
        (None, 0.5, 7, 2),
        ("seen", 1.0, 7, 2),
        (None, 0.75, 7, 2),
    ]


def test_ranks_add_up(tmp_path):
    """Sums are summed; of the largest, of requests and of failures the largest is taken."""

    def work(ranks):
        metrics = StepMetrics()
        batch = collate([row("a", 2)], pad_id=0)
        coef = 0.25 if ranks.rank else 0.5
        metrics.add(batch, result(batch, 1.0, [0.75], [coef], ran=1, missed=0))
        totals = metrics.reduce(
            ranks,
            step=0,
            flags={"stop_requested": ranks.rank == 1, "log_failed": False},
            risk_sums={"risky": 2.0 + ranks.rank},
        )
        names = ("loss", "rows", "kl_coef_sum", "kl_coef_max", "risky")
        return [*(totals.sums[name] for name in names), totals.flags, totals.ledger_rows[0].rank]

    flags = {"stop_requested": True, "log_failed": False}
    expected = [[2.0, 2.0, 0.75, 0.5, 5.0, flags, rank] for rank in range(2)]
    assert on_ranks(2, work, tmp_path) == expected


def test_the_file_goes_on_where_the_checkpoint_was(tmp_path):
    writer = MetricsWriter(tmp_path, position=0)
    writer.write({"step": 0, "loss": 1.0})
    position = writer.digest().bytes
    writer.write({"step": 1, "loss": 2.0})
    writer.close()
    writer = MetricsWriter(tmp_path, position=position)
    writer.write({"step": 1, "loss": math.nan})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 0, "loss": 1.0}', '{"step": 1, "loss": null}']
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
