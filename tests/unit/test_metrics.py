"""Claimed: a step's metrics and ledger rows are the sums and means one would write by hand.

Exact but for the float64 sums of float32 losses (1e-6).
"""

import json
import math

import pytest
import torch
from test_ranks import ALONE, on_ranks

from safereg_dist.data import collate
from safereg_dist.run.metrics import MetricsWriter, StepMetrics, metrics_row
from safereg_dist.types import Row, RowRisks, StepOutput


def row(name, tokens, *, anchor=False):
    return Row(
        id=name,
        input_ids=[1] * (2 + tokens),
        loss_mask=[0, 0, *[1] * tokens],
        prompt_ends=[2],
        risk=None,
        content_key="",
        is_anchor=anchor,
    )


def output(batch, loss, risks, coefs, *, ran, missed):
    """CE of token t is t + 1 on rows that are no anchors, its divergence 10 (t + 1) where b > 0."""
    places = batch.row_of_token.tolist()
    ce = [0.0 if batch.rows[r].is_anchor else t + 1.0 for t, r in enumerate(places)]
    divergence = [10.0 * (t + 1) if coefs[r] > 0 else 0.0 for t, r in enumerate(places)]
    sources = ["test"] * len(batch.rows)
    return StepOutput(
        torch.tensor(loss),
        torch.tensor(ce),
        torch.tensor(divergence),
        RowRisks(risks, {}, sources, {0: "seen"}),
        coefs,
        ran,
        missed,
    )


def a_step():
    metrics = StepMetrics()
    first = collate([row("a", 2), row("b", 3), None], pad_id=0)
    metrics.add(first, output(first, 1.5, [0.25, math.nan, None], [0.0, 0.5, 0.0], ran=1, missed=1))
    second = collate([row("c", 1, anchor=True), row("d", 1), None], pad_id=0)
    risks = [None, 0.5, None]
    metrics.add(second, output(second, 0.25, risks, [1.0, 0.75, 0.0], ran=2, missed=0))
    return metrics


def test_sums_and_rows_of_a_step():
    metrics = a_step()
    total = metrics.reduce(ALONE, stop_requested=False, risk_sums={"risky": 3.0})
    assert total["risky"] == 3.0
    found = metrics_row(total, step=7, lr=0.1, grad_norm=2.0, step_time_s=4.0)
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
    assert total["reference_misses"] == 1.0
    rows = metrics.ledger_rows(step=7, rank=2)
    assert [(r.micro_batch, r.row, r.id, r.estimator, r.divergence) for r in rows] == [
        (0, 0, "a", "test", None),
        (0, 1, "b", "test", 40.0),
        (1, 0, "c", "anchor", 10.0),
        (1, 1, "d", "test", 20.0),
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
        metrics.add(batch, output(batch, 1.0, [0.75], [coef], ran=1, missed=0))
        total = metrics.reduce(
            ranks, stop_requested=ranks.rank == 1, risk_sums={"risky": 2.0 + ranks.rank}
        )
        names = ("loss", "rows", "kl_coef_sum", "kl_coef_max", "stop_requested", "log_failed")
        return [total[name] for name in (*names, "risky")]

    assert on_ranks(2, work, tmp_path) == [[2.0, 2.0, 0.75, 0.5, 1.0, 0.0, 5.0]] * 2


def test_the_file_goes_on_where_the_checkpoint_was(tmp_path):
    writer = MetricsWriter(tmp_path, position=0, first_step=0)
    writer.write({"step": 0, "loss": 1.0})
    position = writer.position()
    writer.write({"step": 1, "loss": 2.0})
    writer.close()
    writer = MetricsWriter(tmp_path, position=position, first_step=1)
    writer.write({"step": 1, "loss": math.nan})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 0, "loss": 1.0}', '{"step": 1, "loss": null}']
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
