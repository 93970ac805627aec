"""Claimed: a Trainer's run that ends early goes on where its last checkpoint was.

Exact: losses, weights, metrics and ledger of a stopped or killed and resumed run equal those of one
that was never interrupted, with dropout and with a coefficient that remembers; the ledger verifies
and `safereg report` reads the folder.
"""

import json
import shutil

import pytest
import torch
from support.trainer_runs import (
    Losses,
    dataset,
    metrics_rows,
    same_weights,
    settings,
    trainer,
    weights,
    write_reference,
)
from transformers import AutoModelForCausalLM

from safereg_dist.errors import CheckpointError
from safereg_dist.evaluate.report import write_report
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.reference import EngineModel
from safereg_dist.risk.probe import Probe
from safereg_dist.run.ledger import verify_ledger

ADAPTIVE = {"regularizer": {"granularity": "batch", "ema": 0.7, "schedule": "linear"}}


def run(folder, reference, *, resume=False, chosen=ADAPTIVE, data=None, **watch):
    seen = Losses(**watch)
    made = trainer(
        folder,
        safereg=settings(reference, **chosen),
        callbacks=[seen],
        args={"save_strategy": "steps", "save_steps": 3},
        **({} if data is None else {"train_dataset": data}),
    )
    try:
        made.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        pass
    return seen.losses, weights(made.model), made


@pytest.mark.parametrize("end", [{"stop": 3}, {"crash": 5}], ids=["stopped", "killed"])
def test_resumed_run_has_the_same_bits(tmp_path, end):
    reference = write_reference(tmp_path / "reference")
    losses, trained, _ = run(tmp_path / "whole", reference)
    assert len(losses) == 6
    assert len(set(losses)) == 6
    before, _, _ = run(tmp_path / "again", reference, **end)
    after, resumed, made = run(tmp_path / "again", reference, resume=True)
    assert made.state.global_step == 6
    assert before[:3] + after == losses
    assert same_weights(resumed, trained)
    assert metrics_rows(tmp_path / "again") == metrics_rows(tmp_path / "whole")
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("whole", "again")]
    assert ledgers[0] == ledgers[1]
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert summary["steps"] == 6
    assert verify_ledger(tmp_path / "again").rows == 24
    assert "Ledger" in write_report([tmp_path / "again"]).read_text()


def test_a_stop_file_saves_and_ends_the_program(tmp_path):
    """Between the checkpoints of the Trainer; a file that an earlier run left stops nothing."""
    reference = write_reference(tmp_path / "reference")
    losses, trained, _ = run(tmp_path / "whole", reference)
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "stop").touch()
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "asked", reference, ask=2)
    assert end.value.code == 75
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
    with pytest.raises(CheckpointError, match="resume from a checkpoint that this Trainer has"):
        run(tmp_path / "run", reference, resume=True)


def test_a_run_that_begins_again_begins_its_logs_again(tmp_path):
    reference = write_reference(tmp_path / "reference")
    torch.manual_seed(0)
    run(tmp_path / "run", reference, stop=2)
    run(tmp_path / "run", reference, stop=1)
    assert len(metrics_rows(tmp_path / "run")) == 1
