"""Claimed: TensorBoard, Weights & Biases and MLflow get the safety metrics with the Trainer's own.

The values are read back from what each has written and held against `metrics.jsonl`: exact to
float32 for TensorBoard, to the last digit else.
"""

import pytest
from support.trackers import wandb_history
from support.trainer_runs import metrics_rows, settings, trainer, write_reference

NAMES = ("divergence", "task_loss", "kl_coef_mean", "risk_mean", "rows", "active_rows")


def run(tmp_path, tracker):
    reference = write_reference(tmp_path / "reference")
    args = {"report_to": tracker, "max_steps": 3, "run_name": "run"}
    trainer(tmp_path / "run", safereg=settings(reference), args=args).train()
    return metrics_rows(tmp_path / "run")


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    rows = run(tmp_path, "tensorboard")
    files = list((tmp_path / "board").rglob("events.out.*"))
    events = EventAccumulator(str(files[0].parent)).Reload()
    for name in NAMES:
        found = events.Scalars(f"train/safereg/{name}")
        assert [event.value for event in found] == pytest.approx([row[name] for row in rows])
        assert [event.step for event in found] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandb(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    import wandb

    rows = run(tmp_path, "wandb")
    wandb.finish()
    wandb.teardown()  # its service writes the file, and has closed it once it has ended
    (path,) = tmp_path.rglob("*.wandb")
    steps = [entry for entry in wandb_history(path) if "train/loss" in entry]
    for name in NAMES:
        assert [e[f"train/safereg/{name}"] for e in steps] == [row[name] for row in rows]


@pytest.mark.filterwarnings("ignore")  # mlflow's own
def test_mlflow(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    rows = run(tmp_path, "mlflow")
    mlflow.end_run()
    for name in NAMES:
        (path,) = (tmp_path / "mlruns").rglob(f"metrics/safereg/{name}")
        values = [float(line.split()[1]) for line in path.read_text().splitlines()]
        assert values == [row[name] for row in rows]
