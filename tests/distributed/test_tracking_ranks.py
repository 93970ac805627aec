"""Claimed: two ranks under the deepspeed launcher train the same bits with all trackers and an
alert that stops them as without; both end and go on together, each tracker has each step once.
A tracker whose package is missing is refused by all ranks before anything is loaded, in one line.

Exact. Trackers are read back with their own readers.
"""

import json
import os

import pytest
from support.builders import write_run
from support.launching import FINETUNE
from support.trackers import wandb_history

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
STEPS = 6
OFFLINE = {"WANDB_MODE": "offline"}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def result(out):
    return (out / "ledger.jsonl").read_bytes(), (out / "model/model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore")  # mlflow's own
def test_ranks_that_are_tracked(tmp_path, launch, monkeypatch):
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = write_run(
        tmp_path,
        rows=24,
        train={"steps": STEPS, "precision": "fp32", "micro_batch_size": 2},
        output_dir=str(tmp_path / "plain"),
        tracking={"to": [], "alerts": None},
    )
    done = launch(FINETUNE, config, ranks=2)
    assert done.status == 0, done.output[-3000:]
    out = tmp_path / "tracked"
    tracked = (
        f"output_dir={out}",
        "tracking.to=[tensorboard, wandb, mlflow]",
        "tracking.alerts={stop: true, held_back: {max: 0, steps: 1}}",
    )
    done = launch(FINETUNE, config, *tracked, ranks=2, launcher="deepspeed", env=OFFLINE)
    assert done.status == 75, done.output[-3000:]
    assert done.output.count("alert at step 0: held_back ") == 1
    assert len(lines(out / "metrics.jsonl")) == 2  # the flag goes with the next step
    # It is outside the band still, so no new alert ends the second start.
    shares = [row["risky_fraction"] for row in lines(tmp_path / "plain" / "metrics.jsonl")]
    assert min(shares) > 0
    done = launch(FINETUNE, config, *tracked, ranks=2, env=OFFLINE)
    assert done.status == 0, done.output[-3000:]
    assert result(out) == result(tmp_path / "plain")
    metrics = lines(out / "metrics.jsonl")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tracking"] == {
        "to": ["tensorboard", "wandb", "mlflow"],
        "dropped": {},
        "alerts": {"held_back": 1},
    }
    (logged,) = (out / "logs").glob("rank0000.*.log")
    assert logged.read_text().count("alert at step 0: held_back") == 1
    (other,) = (out / "logs").glob("rank0001.*.log")
    assert "alert at step" not in other.read_text()

    steps, losses = list(range(STEPS)), [row["loss"] for row in metrics]
    board = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in board] == steps
    assert [event.value for event in board] == pytest.approx(losses)
    rows = [
        row
        for path in sorted((out / "wandb").glob("offline-run-*/*.wandb"))
        for row in wandb_history(path)
    ]
    assert [(row["_step"], row["train/loss"]) for row in rows] == list(
        zip(steps, losses, strict=True)
    )
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((out / "mlruns").as_uri())
    ids = json.loads((out / "tracking.json").read_text())["ids"]
    points = client.get_metric_history(ids["mlflow"], "loss")
    assert [(point.step, point.value) for point in points] == list(zip(steps, losses, strict=True))
    assert client.get_run(ids["mlflow"]).info.status == "FINISHED"


HIDING = """
import importlib.machinery, sys

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *given):
        return None if name == "wandb" else super().find_spec(name, *given)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hiding
"""


def test_a_missing_package_is_refused_by_all_ranks(tmp_path, launch):
    config = write_run(tmp_path, rows=8, output_dir=str(tmp_path / "out"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDING)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    done = launch(
        FINETUNE, config, "tracking.to=[wandb]", launcher="torchrun", env={"PYTHONPATH": path}
    )
    assert done.status == 1  # torchrun's, of ranks that ended with 2
    said = [line for line in done.output.splitlines() if line.startswith("safereg: ")]
    assert said == [
        "safereg: tracking.to names wandb, not installed here: pip install "
        '"safereg-dist[wandb]", or leave it out'
    ]
    assert done.output.count("exitcode  : 2") == 2
    assert not (tmp_path / "out").exists()
