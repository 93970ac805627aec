"""Claimed: a Trainer's run that ends early goes on where its last checkpoint was.

Exact: losses, weights, metrics and ledger of a stopped or killed and resumed run equal those of one
that was never interrupted, with dropout and with a coefficient that remembers; the ledger verifies
and `safereg report` reads the folder.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.builders import tiny_model
from support.trainer_runs import (
    SMALL,
    dataset,
    metrics_rows,
    run_until_cut,
    same_weights,
    settings,
    trainer,
    write_reference,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.evaluate.report import write_report
from safereg_dist.evaluate.report.reading import read_arms
from safereg_dist.evaluate.report.summary import method_of, risk_of
from safereg_dist.evaluate.report.trained import steps_of
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.reference import EngineModel
from safereg_dist.risk.probe import Probe
from safereg_dist.run.ledger import verify_ledger
from safereg_dist.run.watching import MetricsTail, look_at, state_of

ADAPTIVE = {"regularizer": {"granularity": "batch", "ema": 0.7, "schedule": "linear"}}


def run(folder, reference, *, resume=False, chosen=ADAPTIVE, **how):
    return run_until_cut(folder, reference, chosen=chosen, save_steps=3, resume=resume, **how)


@pytest.mark.parametrize("end", [{"stop": 3}, {"crash": 5}], ids=["stopped", "killed"])
def test_resumed_run_has_the_same_bits(tmp_path, end):
    reference = write_reference(tmp_path / "reference")
    losses, trained, _ = run(tmp_path / "whole", reference)
    assert len(losses) == 6
    assert len(set(losses)) == 6
    before, _, _ = run(tmp_path / "again", reference, **end)
    state, note = state_of(tmp_path / "again")
    assert state == ("ended early" if "stop" in end else "stopped")
    if "crash" in end:
        assert note == "resume_from_checkpoint goes on from checkpoint-3"
    after, resumed, made = run(tmp_path / "again", reference, resume=True)
    assert made.state.global_step == 6
    assert before[:3] + after == losses
    assert same_weights(resumed, trained)
    assert metrics_rows(tmp_path / "again") == metrics_rows(tmp_path / "whole")
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("whole", "again")]
    assert ledgers[0] == ledgers[1]
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["total_steps"]) == ("complete", 6, 6)
    assert verify_ledger(tmp_path / "again").rows == 24


def test_its_folder_says_what_a_run_of_our_own_says(tmp_path):
    """Data that a hub data set or the settings name, else `train_dataset`; LoRA's rank."""
    reference = write_reference(tmp_path / "reference")
    _, _, made = run(tmp_path / "plain", reference, stop=4)
    view = look_at(tmp_path / "plain", MetricsTail(tmp_path / "plain" / "metrics.jsonl"))
    assert (view.state, view.step, view.total_steps) == ("ended early", 4, 6)
    (arm,) = read_arms([tmp_path / "plain"], may_be_empty=set())
    assert steps_of(arm) == "4 of 6"
    assert method_of(arm) == "convex, linear"
    assert risk_of(arm) == "column, from 0.5"
    assert [tally.name for tally in arm.ledger.by["source"]] == ["train_dataset"]
    assert arm.config["train"] == {
        "micro_batch_size": 2,
        "grad_accum_steps": 2,
        "precision": "fp32",
        "steps": 6,
    }
    hub = dataset(40)
    hub.info.builder_name, hub.info.dataset_name = "parquet", "beavertails"
    adapted = get_peft_model(tiny_model(**SMALL), LoraConfig(r=3, target_modules="all-linear"))
    made = trainer(
        tmp_path / "lora",
        model=adapted,
        safereg={"risk": {"estimator": "column", "max_held_back": 1.0}},
        train_dataset=hub,
        args={"max_steps": 1},
    )
    made.train()
    (arm,) = read_arms([tmp_path / "lora"], may_be_empty=set())
    assert method_of(arm) == "convex, step, LoRA r 3"
    assert [tally.name for tally in arm.ledger.by["source"]] == ["beavertails"]
    how = {"safereg": made.safereg, "model": made.model, "args": {"max_steps": 1}}
    trainer(tmp_path / "ready", **how).train()
    (ready,) = read_arms([tmp_path / "ready"], may_be_empty=set())
    assert (method_of(ready), risk_of(ready)) == (method_of(arm), "column, from 0.5")
    assert "convex, step, LoRA r 3" in write_report([tmp_path / "lora"]).read_text()


def test_an_error_is_said_to_who_watches(tmp_path):
    reference = write_reference(tmp_path / "reference")

    class Broken(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise ValueError("disk gone")

    made = trainer(tmp_path / "run", safereg=settings(reference), callbacks=[Broken()])
    with pytest.raises(ValueError, match="disk gone"):
        made.train()
    assert state_of(tmp_path / "run") == ("failed", "ValueError: disk gone")


def test_a_stop_file_saves_and_ends_the_program(tmp_path, capsys):
    """Between the checkpoints of the Trainer; a file that an earlier run left stops nothing."""
    reference = write_reference(tmp_path / "reference")
    losses, trained, _ = run(tmp_path / "whole", reference)
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "stop").touch()
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "asked", reference, ask=2)
    assert end.value.code == 75
    said = "stopped on request, status 75: resume_from_checkpoint goes on from checkpoint-2"
    assert said in capsys.readouterr().out.splitlines()
    assert not (tmp_path / "asked" / "stop").exists()
    assert [p.name for p in (tmp_path / "asked").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "asked" / "summary.json").exists()
    after, resumed, _ = run(tmp_path / "asked", reference, resume=True)
    assert after == losses[2:]
    assert same_weights(resumed, trained)
    assert verify_ledger(tmp_path / "asked").rows == 24


def test_risks_of_a_probe_are_kept_over_a_resume(tmp_path, monkeypatch):
    """Twelve rows, four a step: after the checkpoint at step 3 each has been probed."""
    reference = write_reference(tmp_path / "reference")
    model = AutoModelForCausalLM.from_pretrained(reference)
    torch.manual_seed(1)
    size = model.config.hidden_size
    Probe(
        layer=1,
        pooling="last_prompt_token",
        mean=torch.zeros(size),
        scale=torch.ones(size),
        weight=torch.randn(size),
        bias=0.0,
        threshold=0.5,
        fingerprint=model_fingerprint(model),
    ).save(tmp_path / "probe")
    how = {
        "chosen": {"risk": {"estimator": "probe", "path": str(tmp_path / "probe")}},
        "data": dataset(12, risk=False),
    }
    probed = []
    plain = EngineModel.prefix_states

    def counted(self, *args, **kwargs):
        probed.append(args)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(EngineModel, "prefix_states", counted)
    losses, trained, _ = run(tmp_path / "whole", reference, **how)
    before, _, _ = run(tmp_path / "again", reference, stop=3, **how)
    assert probed
    probed.clear()
    after, resumed, _ = run(tmp_path / "again", reference, resume=True, **how)
    assert before + after == losses
    assert same_weights(resumed, trained)
    assert not probed
    rows = metrics_rows(tmp_path / "again")
    assert rows == metrics_rows(tmp_path / "whole")
    assert 0 < sum(row["active_rows"] for row in rows) < sum(row["rows"] for row in rows)


def test_a_checkpoint_without_our_state_is_refused(tmp_path):
    reference = write_reference(tmp_path / "reference")
    run(tmp_path / "run", reference, stop=3)
    shutil.rmtree(tmp_path / "run" / "checkpoint-3" / "safereg")
    with pytest.raises(CheckpointError, match=r"safereg/manifest\.json is missing"):
        run(tmp_path / "run", reference, resume=True)


def test_a_run_that_begins_again_begins_its_logs_again(tmp_path):
    reference = write_reference(tmp_path / "reference")
    torch.manual_seed(0)
    run(tmp_path / "run", reference, stop=2)
    run(tmp_path / "run", reference, stop=1)
    assert len(metrics_rows(tmp_path / "run")) == 1


def test_a_run_that_asks_for_fewer_steps_than_are_done_is_refused(tmp_path):
    """transformers would train one step more, on a model that was ready."""
    reference = write_reference(tmp_path / "reference")
    run(tmp_path / "run", reference)
    again = trainer(
        tmp_path / "run", safereg=settings(reference, **ADAPTIVE), args={"max_steps": 4}
    )
    with pytest.raises(ConfigError, match="has 6 steps and the run asks for 4"):
        again.train(resume_from_checkpoint=True)
    assert len(metrics_rows(tmp_path / "run")) == 6
