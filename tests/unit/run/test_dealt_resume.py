"""Claimed: a run whose risky rows are dealt evenly does not go on with another set of risky rows.

Exact. A real run of one process, stopped by a signal and started again with another override file.
"""

import json
import os
import signal

import pytest
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.launching import FINETUNE, descendants


@pytest.fixture
def config(tmp_path):
    """A run on a risk column, with a reviewer's file beside it."""
    save_model(tmp_path / "model", tiny_model())
    write_jsonl(tmp_path / "train.jsonl", random_rows(20))
    write_jsonl(tmp_path / "reviewed.jsonl", [decision("row-0000", "allow")])
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {tmp_path / 'model'}\n"
        f"data: {{train: {tmp_path / 'train.jsonl'}}}\n"
        "risk: {estimator: column, max_held_back: 1.0, override: "
        f"{tmp_path / 'reviewed.jsonl'}}}\n"
        "train: {steps: 400, precision: fp32, micro_batch_size: 2}\n"
        "engine: {name: single}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    return path


def decision(row: str, action: str) -> dict:
    return {"id": row, "action": action, "reason": "reviewed"}


def test_other_decisions_are_refused_in_the_middle(config, launch, tmp_path):
    process, _ = launch.start(FINETUNE, str(config), ranks=1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None
    (rank,) = descendants(process.pid)
    os.kill(rank, signal.SIGTERM)
    assert process.wait(120) == 75
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    harmless = next(row["id"] for row in rows if row["risk"] < 0.5)
    write_jsonl(tmp_path / "reviewed.jsonl", [decision(harmless, "hold")])
    done = launch(FINETUNE, str(config), ranks=1)
    assert done.status == 2, done.output
    assert "the rows that are dealt as risky are not those of" in done.output
    done = launch(FINETUNE, str(config), "reference.balance=none", ranks=1)
    assert "another configuration" in done.output
