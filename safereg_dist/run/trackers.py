"""TensorBoard, Weights & Biases and MLflow: each told of a run's steps in its own words.

Names are those that transformers' Trainer reports under, so that runs of both lie in one chart:
`train/loss`, `train/learning_rate`, `train/safereg/divergence`; in MLflow without `train/`.
What runs here runs in a thread of its own (`tracking`): it may fail, and may take its time.
"""

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from safereg_dist.config import TrackingConfig
from safereg_dist.errors import ConfigError
from safereg_dist.models.extras import install

_AT_ONCE = 100
"""Parameters in one request to MLflow: its limit."""
_LONGEST = 6000
"""Characters of a parameter of MLflow: its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run at its start."""

    config: TrackingConfig
    folder: Path
    """The run folder."""
    settings: Mapping[str, Any]
    """The configuration, fit to be sent (`tracking.shareable`)."""
    first_step: int
    """The step that this start of the run begins with."""
    known: Callable[[str], str | None]
    """A tracker's name for this run, where an earlier start has told it."""
    remember: Callable[[str, str], None]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.run_name or self.folder.resolve().name

    @property
    def local(self) -> Path:
        """Where what is kept on this machine goes."""
        return self.folder if self.config.folder is None else Path(self.config.folder)


class Tracker(Protocol):
    """Told of a run's steps, in order. Any call may raise anything, and may take long."""

    def open(self) -> None:
        """Begins the run there, or goes on with it."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The finite metrics of a step, under the Trainer's names."""
        ...

    def alert(self, step: int, text: str) -> None:
        """One line, said where the tracker has a place for it."""
        ...

    def close(self, status: int) -> None:
        """Ends it: 0 trained to the end, 75 saved on request and to be gone on with, 1 failed."""
        ...


def require_trackers(config: TrackingConfig) -> None:
    """Raises ConfigError where a tracker of `tracking.to` is not installed."""
    missing = [name for name in config.to if not _is_installed(name)]
    if missing:
        raise ConfigError(
            f"tracking.to names {', '.join(missing)}, not installed here: {install(*missing)}, or "
            "leave it out"
        )


def tracker_of(name: str, run: TrackedRun) -> Tracker:
    """The tracker of a name in `tracking.to`; nothing is loaded or written yet."""
    kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": Mlflow}
    return kinds[name](run)


def _is_installed(name: str) -> bool:
    """Whether there is a package, and not just a folder of that name, as W&B leaves behind."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


class TensorBoard:
    """Events below RUN/tensorboard. Steps that are run again hide those of before the cut."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run

    def open(self) -> None:
        """Opens a file of events."""
        from torch.utils.tensorboard import SummaryWriter

        run = self._run
        folder = run.local / "tensorboard"
        if run.config.folder is not None:  # other runs may be there too
            folder /= run.name
        self._board = SummaryWriter(str(folder), purge_step=run.first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar for each metric."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def alert(self, step: int, text: str) -> None:
        """A text under `alerts`."""
        self._board.add_text("alerts", text, step)

    def close(self, status: int) -> None:
        """Writes what is left."""
        self._board.close()


class WeightsAndBiases:
    """One run of W&B under an id that the run folder keeps; offline as `WANDB_MODE` says.

    A server that has a step already keeps it, and what is sent again is dropped.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run

    def open(self) -> None:
        """Begins the run, or resumes it."""
        import wandb

        run = self._run
        known = run.known("wandb")
        name = known or secrets.token_hex(4)
        run.remember("wandb", name)
        folder = None if "WANDB_DIR" in os.environ and run.config.folder is None else run.local
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.config.project),
            name=run.name,
            id=name,
            resume="allow",
            dir=folder,
            config=dict(run.settings),
            reinit="create_new",
            settings=wandb.Settings(
                # No output, program, repository or machine, and no question for a key, which would
                # wait for an answer in the middle of training.
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                silent=True,
            ),
        )
        if self._wandb.url:
            tqdm.write(f"wandb: {self._wandb.url}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A row of its history."""
        self._wandb.log(dict(values), step=step)

    def alert(self, step: int, text: str) -> None:
        """An alert of W&B, which mails it to who wants that."""
        self._wandb.alert(title=f"safereg: step {step}", text=text, level="WARN")

    def close(self, status: int) -> None:
        """Ends the run; one that is to be gone on with counts as preempted."""
        if status == 75:
            self._wandb.mark_preempting()
        self._wandb.finish(exit_code=status)


class Mlflow:
    """One run of MLflow whose id the run folder keeps; at `MLFLOW_TRACKING_URI`, or in files.

    It would keep a step twice: what it has is asked for at the start, and not sent again.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._told = -1
        """The last step that it has."""
        self._alerts = 0

    def open(self) -> None:
        """Begins the run, or goes on with it."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            # MLflow wants a database by now; the small package comes without one.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (self._run.local / "mlruns").resolve().as_uri()
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        known = self._run.known("mlflow")
        self._id = self._begin() if known is None else known
        if known is None:
            self._run.remember("mlflow", self._id)
            return
        self._client.update_run(self._id, status="RUNNING")
        history = self._client.get_metric_history(self._id, "loss")
        self._told = max((point.step for point in history), default=-1)

    def _begin(self) -> str:
        from mlflow.entities import Param

        client, config = self._client, self._run.config
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", config.project)
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if found is None else found.experiment_id
        run_id = client.create_run(experiment, run_name=self._run.name).info.run_id
        flat = flattened(self._run.settings)
        params = [Param(key, str(value)[:_LONGEST]) for key, value in flat.items()]
        for at in range(0, len(params), _AT_ONCE):
            client.log_batch(run_id, params=params[at : at + _AT_ONCE])
        return run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step, in one request."""
        from mlflow.entities import Metric

        if step <= self._told:
            return
        now = int(time.time() * 1000)
        metrics = [Metric(_plain(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def alert(self, step: int, text: str) -> None:
        """A tag: MLflow has no alerts."""
        self._client.set_tag(self._id, f"safereg.alert.{step}", text)

    def close(self, status: int) -> None:
        """Ends the run; one that is to be gone on with is scheduled again."""
        if status == 75:
            self._client.update_run(self._id, status="SCHEDULED")
        else:
            self._client.set_terminated(self._id, "FAILED" if status else "FINISHED")


def _plain(name: str) -> str:
    """The name under which the Trainer tells MLflow of a metric."""
    return name.removeprefix("train/").replace("eval/", "eval_")


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping, with names such as `train.steps`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
