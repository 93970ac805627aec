"""Claimed: who follows one optimizer step with a risk column opens 14 files or fewer, head apart.

Exact: the project's files of which a line runs between the call of `optimizer_step` and its return.
"""

import sys
import threading
from pathlib import Path

import pytest
from support.builders import random_rows, save_model, tiny_model, write_jsonl

import safereg_dist
from safereg_dist import build_run, optimizer_step, start_backend
from safereg_dist.config import config_from_dict

PACKAGE = Path(safereg_dist.__file__).parent
MOST_FILES = 14


def files_that_run(call) -> set[str]:
    """Files of the package of which a function runs, in any thread, while `call()` does."""
    seen: set[str] = set()

    def watch(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            seen.add(str(path.relative_to(PACKAGE)))

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return seen


@pytest.fixture
def run(tmp_path):
    save_model(tmp_path / "model", tiny_model(num_hidden_layers=1))
    write_jsonl(tmp_path / "train.jsonl", random_rows(8))
    return build(
        {
            "model": str(tmp_path / "model"),
            "data": {"train": str(tmp_path / "train.jsonl")},
            "risk": {"estimator": "column"},
            "train": {"micro_batch_size": 2, "grad_accum_steps": 2, "precision": "fp32"},
            "engine": {"name": "single"},
            "output_dir": str(tmp_path / "out"),
        }
    )


def build(raw):
    config = config_from_dict(raw)
    return build_run(config, start_backend(config))


def test_one_step_is_few_files(run):
    rows = run.sources.rows_of_step(0)
    found = {}

    def step():
        found["step"] = optimizer_step(run, rows, step=0, lr=1e-3)

    files = files_that_run(step)
    assert found["step"].totals.sums["reference_rows"] > 0  # the whole path was taken
    assert {"trainer.py", "step.py", "objective.py", "metrics.py"} <= files
    assert len(files) <= MOST_FILES, sorted(files)
