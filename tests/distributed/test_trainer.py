"""Claimed: a Trainer's run on two ranks resumes, saves and ends windows as one on one rank does.

Exact: a resumed run under DDP, ZeRO-3 and FSDP2 (losses, weights, metrics, ledger), the weights
that `save_model` wrote, an error that one rank sees, damage that one finds. Rounds: logged losses
(float32).
"""

import json

import pytest
from safetensors.torch import load_file
from support.launching import ROOT
from support.trainer_runs import features, metrics_rows, same_weights, write_reference
from transformers import AutoModelForCausalLM

from safereg_dist.run.ledger import verify_ledger

WORKER = ROOT / "tests" / "distributed" / "trainer_worker.py"
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    write_reference(tmp_path / "reference")
    return tmp_path


def run_worker(folder, launch, work, engine, *, ranks=2):
    """What all ranks found."""
    done = launch(WORKER, work, engine, str(folder), ranks=ranks)
    assert done.status == 0, done.output[-4000:]
    return [json.loads((folder / f"{work}.rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    "engine", ["ddp", pytest.param("zero-3", marks=pytest.mark.deepspeed), "fsdp2"]
)
def test_resume_and_save(folder, launch, engine):
    found = run_worker(folder, launch, "resume", engine)
    for rank in found:
        whole, again = rank["losses"]
        assert whole == again
        assert len(set(whole)) == 6
        assert rank["same_weights"]
    loaded = AutoModelForCausalLM.from_pretrained(folder / "saved")
    trained = load_file(folder / "trained.safetensors")
    assert same_weights(dict(loaded.named_parameters()), trained)
    assert metrics_rows(folder / "again") == metrics_rows(folder / "whole")
    ledgers = [(folder / name / "ledger.jsonl").read_text() for name in ("whole", "again")]
    assert ledgers[0] == ledgers[1]
    assert verify_ledger(folder / "again").rows == 6 * 8


def test_another_number_of_ranks_is_in_the_ledger(folder, launch):
    run_worker(folder, launch, "begun", "ddp")
    [found] = run_worker(folder, launch, "went_on", "ddp", ranks=1)
    assert len(found["losses"]) == 3
    summary = json.loads((folder / "ranks" / "summary.json").read_text())
    assert summary["rank_changes"] == [{"step": 3, "before": 2, "now": 1}]
    assert verify_ledger(folder / "ranks").rows == 3 * 8 + 1 + 3 * 4


def test_windows_streams_and_evaluation(folder, launch):
    one, other = run_worker(folder, launch, "windows", "ddp")
    rows = features(20)
    tokens = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    found = metrics_rows(folder / "windows")
    assert [row["rows"] for row in found] == [8, 8, 4]
    active = [index % 4 < 2 and count > 0 for index, count in enumerate(tokens)]
    parts = (slice(0, 8), slice(8, 16), slice(16, 20))
    assert [row["active_rows"] for row in found] == [sum(active[part]) for part in parts]
    counts = [sum(tokens[part]) for part in parts]
    assert [row["response_tokens"] for row in found] == counts
    assert one["losses"] == pytest.approx([row["loss"] for row in found], rel=1e-6)
    ledger = [json.loads(x) for x in (folder / "windows" / "ledger.jsonl").read_text().splitlines()]
    assert {row["rank"] for row in ledger if row["kl_coef"] > 0} == {0}
    assert one["losses"] == other["losses"] == one["evaluated"]
    assert len(one["eval_loss"]) == 2  # after the second step and at the end
    assert one["eval_loss"] == other["eval_loss"]
    streamed = metrics_rows(folder / "stream")
    assert [row["rows"] for row in streamed] == [8] * 3
    ids = [json.loads(x) for x in (folder / "stream" / "ledger.jsonl").read_text().splitlines()]
    assert sorted(int(row["id"].split("-")[1]) for row in ids) == list(range(24))  # none twice


def test_all_ranks_raise_what_one_sees(folder, launch):
    one, other = run_worker(folder, launch, "errors", "ddp")
    assert "has risk 7.0" in one["errors"][0]
    assert "has risk 7.0" in other["errors"][0]
    assert one["errors"][0].startswith("DataError: rank 1:")


@pytest.mark.deepspeed
def test_all_ranks_refuse_what_one_finds_changed(folder, launch):
    for found in run_worker(folder, launch, "damaged", "zero-3"):
        assert "zero_pp_rank_1_mp_rank_00_optim_states.pt was changed" in found["error"]
        assert "(rank 1): resume from another checkpoint" in found["error"]
