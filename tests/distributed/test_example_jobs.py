"""Claimed: the examples that are whole jobs run as they are written, from any folder.

The model is the demo's, a little trained; the judge is a real server that answers as Llama Guard
does. The ledger, the report and the figures that a job leaves are read back.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from same_bits.world import BASE_STEPS, HIDDEN_SIZE, NUM_LAYERS
from support.builders import write_jsonl
from support.critic_server import risk_of, running_server
from support.launching import ROOT

from safereg_dist.demo.base import PEAK_LEARNING_RATE, batch_source
from safereg_dist.demo.tokenizer import build_tokenizer
from safereg_dist.demo.training import save_model, train_from_scratch
from safereg_dist.demo.world import DATA_SETS

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]
EXAMPLES = ROOT / "launch" / "examples"
SHORT = ("train.steps=3", "train.micro_batch_size=4", "risk.max_held_back=0.6")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "model"
    tokenizer = build_tokenizer()
    base = train_from_scratch(
        tokenizer,
        batch_source(0),
        seed=0,
        steps=BASE_STEPS,
        learning_rate=PEAK_LEARNING_RATE,
        hidden_size=HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        name="base",
        progress=False,
    )
    save_model(base, tokenizer, folder)
    return folder


def run(job: str, *arguments: object, folder: Path, **env: str) -> str:
    """What the job printed; it has to succeed."""
    done = subprocess.run(
        ["bash", EXAMPLES / job / "run.sh", *map(str, arguments), *SHORT],
        cwd=folder,
        env=os.environ | {"SAFEREG_CACHE": str(folder / "cache"), **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ledger_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_own_rows_from_probe_to_report(model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", DATA_SETS["train"](0)[:80])
    labelled = write_jsonl(tmp_path / "labelled.jsonl", DATA_SETS["probe"](0)[:480])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", DATA_SETS["eval"](0)[::20])
    printed = run("own_rows", model, rows, labelled, prompts, "out", folder=tmp_path)
    out = tmp_path / "out" / "run"
    assert {row["estimator"] for row in ledger_of(out)} <= {"probe-reference", "anchor"}
    [base] = json.loads((out / "eval.json").read_text())["against"]
    assert base == "base"
    assert (out / "report.html").stat().st_size > 10_000
    assert "ledger holds: 24 rows" in printed


def test_probe_without_labels(model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", DATA_SETS["train"](0)[:80])
    unlabelled = [{"prompt": row["prompt"]} for row in DATA_SETS["probe"](0)[:480]]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", unlabelled)
    run("probe_without_labels", model, rows, prompts, "out", folder=tmp_path)
    assert {row["estimator"] for row in ledger_of(tmp_path / "out" / "run")} == {"probe-reference"}


def test_judge_ahead_of_time(model: Path, tmp_path: Path) -> None:
    numbered = [
        {"id": f"{n}", "prompt": f"name a tree pair {n:05d}", "response": "the tree is tall"}
        for n in range(1, 41)
    ]
    rows = write_jsonl(tmp_path / "rows.jsonl", numbered)
    with running_server("good") as server:
        known = {"ENDPOINT": server.url, "JUDGE": "guard"}
        run("judge_ahead", model, rows, "out", folder=tmp_path, **known)
    for row in ledger_of(tmp_path / "out" / "run"):
        assert row["risk"] == pytest.approx(risk_of(int(row["id"])), abs=1e-4)
