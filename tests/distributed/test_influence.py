"""Claimed: the influence of a row is the same on ranks that shard the reference as on one process,
where ranks have different rows, and in training by the real launcher.

Rounds: float32 against outer products in float64, 2e-5 in risks. Exact: which rows are scored.
"""

import json

import pytest
import yaml
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.influence import expected_risks, settings, watched_file
from support.launching import FINETUNE

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


@pytest.mark.parametrize("launcher", ["deepspeed", "preloaded"])
def test_two_ranks_find_what_one_finds(tmp_path, launch, launcher):
    """ZeRO-3 for policy and reference by deepspeed's launcher; fsdp2's shards by a quick one."""
    save_model(tmp_path / "model", tiny_model(seed=0))
    write_jsonl(tmp_path / "train.jsonl", random_rows(17, risk=False))
    write_jsonl(tmp_path / "watched.jsonl", watched_file())
    engine = {"name": "deepspeed" if launcher == "deepspeed" else "fsdp2"}
    config = {
        "model": str(tmp_path / "model"),
        "data": {"train": str(tmp_path / "train.jsonl")},
        # The gate is off, so that the first rows are scored in the step itself.
        "risk": {**settings(tmp_path), "cache": "none"},
        "regularizer": {"threshold": 0.5},
        "reference": {"rows_per_pass": 2},
        "train": {"epochs": 2, "micro_batch_size": 3, "precision": "fp32"},
        "engine": engine,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = launch(FINETUNE, tmp_path / "run.yaml", ranks=2, launcher=launcher)
    assert done.status == 0, done.output[-4000:]
    lines = (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()
    entries = [row for row in map(json.loads, lines) if "id" in row]
    assert {row["rank"] for row in entries} == {0, 1}
    want = expected_risks(tmp_path, watched_file(), positions=2, rate=0.1)
    assert {row["id"] for row in entries} == set(want)
    for row in entries:
        assert row["risk"] == pytest.approx(want[row["id"]], abs=2e-5), row
        assert (row["kl_coef"] > 0) == (row["risk"] >= 0.5)
    assert min(want.values()) < 0.5 < max(want.values())
