"""Claimed: TensorBoard, W&B and MLflow hold what a run has told them, each step once where they can
do that, also after a cut; one that fails or hangs is dropped and holds nothing up; nothing is sent
that names a secret, a home or a place on the disk.

Read back with each tracker's own reader (W&B's file: its own message classes). Exact to float32 for
TensorBoard, to the last digit else. Failures are real: closed ports, files in the way, a server
that accepts and never answers.
"""

import json
import math
import socket
import threading
import time
from pathlib import Path

import pytest
import wandb
from support.trackers import wandb_history, wandb_records

from safereg_dist.config import TrackingConfig, config_from_dict
from safereg_dist.config.tracking import TRACKERS
from safereg_dist.errors import ConfigError
from safereg_dist.run import trackers, tracking
from safereg_dist.run.tracking import Tracking, read_tracking, shareable, tracked_values

pytestmark = pytest.mark.filterwarnings("ignore")  # W&B's and MLflow's own


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def config_of(output_dir, *to, **more):
    return config_from_dict(
        {
            "model": str(Path.home() / "models" / "mine"),
            "data": {"train": "t.jsonl"},
            "risk": {"estimator": "column"},
            "tracking": {"to": list(to), **more},
            "output_dir": str(output_dir),
        }
    )


def row_of(step, loss=None):
    return {
        "step": step,
        "loss": 1 / (step + 1) if loss is None else loss,
        "grad_norm": 1.0,
        "lr": 0.1,
        "divergence": step / 7,
        "validation_loss": 2.0,
    }


def follow(config, steps, *, status=0, changes=()):
    """Tells the trackers of these steps, as one start of a run; the facts of its summary."""
    with Tracking(
        config,
        is_main=True,
        first_step=steps[0],
        total_steps=10,
        rows_per_step=4,
        held_back=None,
    ) as told:
        for step in steps:
            told.write({**row_of(step), **dict(changes).get(step, {})})
        if status is not None:
            told.finish(status)
    if "wandb" in config.tracking.to:
        wandb.teardown()  # its service writes the file, and has closed it once it has ended
    return told.facts()


CUT = (range(5), range(3, 8))
"""Steps of two starts: the first was killed two steps after its checkpoint."""


def test_tensorboard_shows_steps_that_are_run_again_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tmp_path, "tensorboard")
    follow(config, CUT[0], status=None, changes={2: {"loss": math.nan}, 4: {"loss": 9.0}}.items())
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1"))  # as of an earlier second
    facts = follow(config, CUT[1])
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        (step, pytest.approx(1 / (step + 1))) for step in range(8) if step != 2
    ]
    found = board.Scalars("train/safereg/divergence")
    assert [(e.step, e.value) for e in found] == [(s, pytest.approx(s / 7)) for s in range(8)]
    assert [e.value for e in board.Scalars("eval/loss")] == [2.0] * 8
    (said,) = board.Tensors("alerts/text_summary")
    assert said.step == 2
    assert b"alert at step 2: non_finite 1 is above 0" in said.tensor_proto.string_val[0]
    assert facts == {"to": ["tensorboard"], "dropped": {}, "alerts": {"non_finite": 1}}


def test_wandb_goes_on_with_one_run(tmp_path):
    config = config_of(tmp_path, "wandb", project="p", run_name="name")
    follow(config, range(5), status=75)
    follow(config, range(5, 8), changes={6: {"grad_norm": math.inf}}.items())
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    rows = [row for path in files for row in wandb_history(path)]
    assert [row["_step"] for row in rows] == list(range(8))
    assert [row["train/loss"] for row in rows] == [1 / (step + 1) for step in range(8)]
    assert [row["train/safereg/divergence"] for row in rows] == [step / 7 for step in range(8)]
    kinds = [[r.WhichOneof("record_type") for r in wandb_records(path)] for path in files]
    records = [record for path in files for record in wandb_records(path)]
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert {(r.run_id, r.project, r.display_name) for r in runs} == {
        (read_tracking(tmp_path / "tracking.json")["ids"]["wandb"], "p", "name")
    }
    assert "preempting" in kinds[0]
    (alert,) = (r.alert for r in records if r.WhichOneof("record_type") == "alert")
    assert alert.text.startswith("alert at step 6: non_finite 1 is above 0")
    settings = {u.key: json.loads(u.value_json) for u in runs[0].config.update}
    assert settings["model"] == ".../mine"
    assert settings["train"]["seed"] == 0
    for path in files:
        assert str(Path.home() / "models").encode() not in path.read_bytes()
        assert b"test_tracking" not in path.read_bytes().replace(bytes(tmp_path), b"")


def test_mlflow_has_every_step_once(tmp_path):
    from mlflow import MlflowClient

    config = config_of(tmp_path, "mlflow", project="p", run_name="name")
    follow(config, CUT[0], status=None)
    facts = follow(config, CUT[1], changes={7: {"loss": math.nan}}.items())
    assert facts["dropped"] == {}
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("p")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "name"
    assert run.info.status == "FINISHED"
    for name, count in {"loss": 7, "safereg/divergence": 8, "eval_loss": 8}.items():
        points = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in points] == list(range(count))
    points = client.get_metric_history(run.info.run_id, "safereg/divergence")
    assert [point.value for point in points] == [step / 7 for step in range(8)]
    assert run.data.params["model"] == ".../mine"
    assert run.data.params["train.micro_batch_size"] == "4"
    assert run.data.tags["safereg.alert.7"].startswith("alert at step 7: non_finite")


def test_the_environment_says_where(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "shared").as_uri())
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "dir"))
    (tmp_path / "dir").mkdir()
    config = config_of(tmp_path / "run", "mlflow", "wandb")
    facts = follow(config, range(2), status=75)
    assert facts["dropped"] == {}
    assert list((tmp_path / "dir").rglob("*.wandb"))
    client = MlflowClient((tmp_path / "shared").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("safereg").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "SCHEDULED")
    assert not (tmp_path / "run" / "mlruns").exists()


def test_a_folder_of_their_own(tmp_path):
    folder = str(tmp_path / "all")
    follow(config_of(tmp_path / "run", "tensorboard", "mlflow", folder=folder), range(2))
    assert list((tmp_path / "all" / "tensorboard" / "run").iterdir())
    assert (tmp_path / "all" / "mlruns").is_dir()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["tracking.json"]


# What fails


@pytest.fixture
def silent_server():
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_one_that_fails_is_dropped_with_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb").touch()  # where its folder would be
    (tmp_path / "tensorboard").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    facts = follow(config_of(tmp_path, *TRACKERS), range(3))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("safereg: ")]
    assert set(facts["dropped"]) == {"tensorboard", "mlflow", "wandb"}
    assert len(lines) == 3
    assert all("is told no more of this run, which goes on: " in line for line in lines)
    assert read_tracking(tmp_path / "tracking.json")["dropped"] == facts["dropped"]


def test_a_run_ends_once_a_drop_is_said():
    """The tracker's thread drops it, slowly, while the run waits for it."""
    said, begun = [], threading.Event()

    class Refuses:
        def open(self):
            raise OSError("no")

    def drop(name, error):
        begun.set()
        time.sleep(0.3)
        said.append(name)

    follower = tracking._Follower("slow", Refuses(), drop)
    begun.wait()
    follower.wait(time.monotonic() + 60)
    assert said == ["slow"]


def test_one_that_hangs_holds_no_step_up(tmp_path, monkeypatch, silent_server):
    monkeypatch.setattr(tracking, "CLOSE_S", 5.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    config = config_of(tmp_path, "mlflow", "tensorboard")
    import mlflow  # noqa: F401 - seconds, which are not what is measured here
    import torch.utils.tensorboard  # noqa: F401

    began = time.monotonic()
    with Tracking(
        config, is_main=True, first_step=0, total_steps=9, rows_per_step=4, held_back=None
    ) as told:
        for step in range(1000):
            told.write(row_of(step))
        assert time.monotonic() - began < 5
        told.finish(0)
    assert time.monotonic() - began < 20
    assert told.facts()["dropped"].keys() == {"mlflow"}
    assert "TimeoutError" in told.facts()["dropped"]["mlflow"]


def test_one_that_does_not_keep_up_is_dropped(tmp_path, monkeypatch, silent_server):
    monkeypatch.setattr(tracking, "BACKLOG", 10)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    facts = follow(config_of(tmp_path, "mlflow"), range(20))
    assert facts["dropped"] == {"mlflow": "TimeoutError: it is 10 steps behind"}


def test_wandb_without_a_key_is_dropped_and_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    facts = follow(config_of(tmp_path / "run", "wandb"), range(2))
    assert "No API key" in facts["dropped"]["wandb"]


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    require = trackers.require_trackers
    require(TrackingConfig(to=("tensorboard", "wandb", "mlflow")))
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "safereg-dist\[mlflow,wandb\]", or'):
        require(TrackingConfig(to=("wandb", "mlflow")))
    require(TrackingConfig(to=()))


# What is sent


def test_the_configuration_is_sent_without_secrets_and_places(monkeypatch, tmp_path):
    monkeypatch.setenv("SAFEREG_API_KEY", "sk-very-secret")
    config = config_from_dict(
        {
            "model": "~/models/mine",
            "data": {"train": [{"path": "/home/me/rows.jsonl"}, {"path": "near/rows.jsonl"}]},
            "risk": {
                "estimator": "critic",
                "critic": {
                    "endpoint": "https://me:sk-very-secret@host:8/v1?key=sk-other",
                    "model": "guard-sk-very-secret",
                    "format": "f",
                },
            },
            "signing": {"ed25519": "/home/me/key.pem"},
            "output_dir": "/home/me/runs/mine",
        }
    )
    sent = shareable(config)
    assert sent["model"] == ".../mine"
    assert [each["path"] for each in sent["data"]["train"]] == [".../rows.jsonl", "near/rows.jsonl"]
    assert sent["risk"]["critic"]["endpoint"] == "https://***host:8/v1?***"
    assert sent["risk"]["critic"]["model"] == "guard-***"
    assert sent["signing"] == {"hmac_env": None, "ed25519": ".../key.pem"}
    assert sent.pop("output_dir") == "/home/me/runs/mine"
    assert "/home" not in json.dumps(sent)
    assert "secret" not in json.dumps(sent)


def test_names_are_the_trainers():
    row = {"step": 3, "loss": 1.0, "lr": 0.5, "grad_norm": math.nan, "risky_rows/fraud": 2}
    assert tracked_values(row) == {
        "train/loss": 1.0,
        "train/learning_rate": 0.5,
        "train/safereg/risky_rows/fraud": 2,
    }


def test_what_is_remembered_survives_damage(tmp_path):
    for text in ("", "[]", '{"ids": 3, "dropped": {"a": 1, "b": "c"}, "total_steps": "9"}'):
        (tmp_path / "tracking.json").write_text(text)
        found = read_tracking(tmp_path / "tracking.json")
        assert found["ids"] == {}
        assert found["total_steps"] is None
    assert found["dropped"] == {"b": "c"}


def test_other_ranks_tell_nobody(tmp_path):
    config = config_of(tmp_path / "run", "tensorboard")
    with Tracking(
        config, is_main=False, first_step=0, total_steps=9, rows_per_step=4, held_back=None
    ) as told:
        told.write(row_of(0, loss=math.nan))
        told.finish(0)
    assert not told.wants_stop
    assert told.facts()["alerts"] == {}
    assert not (tmp_path / "run").exists()
