"""Who follows a run on its main rank: trackers, each in a thread of its own, and alerts.

Training waits for none of them: a step's row is put into the queue of each tracker, and one that
fails, or does not keep up, is dropped with a line of warning. `metrics.jsonl` is the truth, and is
written elsewhere (`log`).

    tracking.json    the run's ids at the trackers, how many steps it has, who was dropped
    alerts.jsonl     a line for each alert (`alerts`)
"""

import json
import logging
import math
import queue
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from safereg_dist.config import Config
from safereg_dist.errors import CheckpointError, reason_of
from safereg_dist.run.alerts import AlertFile, Alerts
from safereg_dist.run.metrics import METRICS_NAME
from safereg_dist.run.rank_log import masked, secrets_of_environment
from safereg_dist.run.trackers import TrackedRun, Tracker, tracker_of
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import json_objects, parse_json

TRACKING_NAME = "tracking.json"
BACKLOG = 10_000
"""Steps that a tracker may be behind; a step's row is a few kilobytes."""
CLOSE_S = 60.0
"""How long the end of a run waits for trackers that are behind, all together."""
_OF_THE_TRAINER = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/learning_rate",
    "tokens_per_s": "train/tokens_per_s",
    "step_time_s": "train/step_time_s",
    "peak_memory_bytes": "train/peak_memory_bytes",
    "validation_loss": "eval/loss",
}
_ADDRESS = re.compile(r"(?<=://)[^/@\s]*@|(?<=\?)\S+")  # who asks, and the query: both may be keys

_LOG = logging.getLogger("safereg_dist")  # for the rank's log alone, which sees every record
_LOG.addHandler(logging.NullHandler())
_LOG.propagate = False

Number = float | int


def warn(text: str) -> None:
    """One line on the screen, beside a progress bar, and in this rank's log."""
    tqdm.write(f"safereg: {text}", file=sys.stderr)
    _LOG.warning("safereg: %s", text)


class Tracking:
    """Tells the trackers and watches the bands; on ranks other than the main one nothing.

    Collectives: none. `wants_stop` goes with the flags of the next step, as a request of any rank
    does, so that all ranks stop together.
    """

    def __init__(
        self,
        config: Config,
        *,
        is_main: bool,
        first_step: int,
        total_steps: int,
        rows_per_step: int,
        held_back: float | None,
    ) -> None:
        """`metrics.jsonl` ends before `first_step`; `held_back` as in `Alerts`."""
        self.wants_stop = False
        """Whether an alert stops the run (`tracking.alerts.stop`)."""
        self._config, self._folder = config.tracking, Path(config.output_dir)
        self._followers: list[_Follower] = []
        self._alerts: Alerts | None = None
        self._file: AlertFile | None = None
        self._counts: Counter[str] = Counter()
        self._dropped: dict[str, str] = {}
        if not is_main:
            return
        self._memory = _Memory(self._folder / TRACKING_NAME, total_steps)
        self._dropped = self._memory.dropped
        if self._config.alerts is not None:
            self._alerts = Alerts(
                self._config.alerts, rows_per_step=rows_per_step, held_back=held_back
            )
            for row in json_objects(self._folder / METRICS_NAME):  # before the resumption
                self._alerts.observe(row)
            try:
                self._file = AlertFile(self._folder, first_step=first_step)
                self._counts = self._file.counts
            except (OSError, CheckpointError) as err:
                self._drop("alerts.jsonl", err)
        run = TrackedRun(
            config=self._config,
            folder=self._folder,
            settings=shareable(config),
            first_step=first_step,
            known=self._memory.known,
            remember=self._memory.remember,
        )
        self._followers = [
            _Follower(name, tracker_of(name, run), self._drop) for name in self._config.to
        ]

    def write(self, row: Mapping[str, Number]) -> None:
        """Hands the row of a step on; returns at once, and raises nothing."""
        step = int(row["step"])
        if self._followers:
            values = tracked_values(row)
            for follower in self._followers:
                follower.put("write", step, values)
        for alert in () if self._alerts is None else self._alerts.observe(row):
            assert self._config.alerts is not None
            self.wants_stop |= self._config.alerts.stop
            ending = ": the run saves and stops" if self._config.alerts.stop else ""
            warn(f"{alert}{ending}")
            self._counts[alert.name] += 1
            for follower in self._followers:
                follower.put("alert", step, str(alert))
            try:
                if self._file is not None:
                    self._file.write(alert)
            except OSError as err:
                self._file = None
                self._drop("alerts.jsonl", err)

    def finish(self, status: int) -> None:
        """Ends the run at all trackers; waits up to `CLOSE_S` for those that are behind."""
        for follower in self._followers:
            follower.put("close", status)
        end = time.monotonic() + CLOSE_S
        for follower in self._followers:
            follower.wait(end)
        self._followers = []

    def facts(self) -> dict[str, Any]:
        """For `summary.json`, on the main rank: who was told, who was dropped, alerts by name."""
        return {
            "to": list(self._config.to),
            "dropped": dict(self._dropped),
            "alerts": dict(self._counts),
        }

    def _drop(self, name: str, err: BaseException) -> None:
        reason = f"{type(err).__name__}: {reason_of(err)}"
        reason = masked(reason, secrets_of_environment())
        self._memory.note_dropped(name, reason)
        warn(f"{name} is told no more of this run, which goes on: {reason}")

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends what `finish` has not: the run has failed."""
        self.finish(1)


class _Follower(threading.Thread):
    """A tracker in a thread of its own, behind a queue that training never waits for."""

    def __init__(
        self, name: str, tracker: Tracker, drop: Callable[[str, BaseException], None]
    ) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)
        self._label, self._tracker, self._drop = name, tracker, drop
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(BACKLOG)
        self._lock = threading.Lock()
        self._has_ended = False
        self.start()

    def put(self, what: str, *given: Any) -> None:
        """Queues a call of the tracker's method `what`; `close` is the last."""
        if self._has_ended:
            return
        try:
            self._queue.put_nowait((what, given))
        except queue.Full:
            self.give_up(TimeoutError(f"it is {BACKLOG} steps behind"))

    def give_up(self, err: BaseException) -> None:
        """Drops the tracker, once; returns when that is noted and said, by whichever thread."""
        with self._lock:
            if not self._has_ended:
                self._has_ended = True
                self._drop(self._label, err)

    def wait(self, end: float) -> None:
        """Waits for the tracker to have done it all, until `end` of the monotonic clock."""
        if not self._has_ended:
            self.join(max(0.0, end - time.monotonic()))
        if self.is_alive():
            self.give_up(TimeoutError(f"not done {CLOSE_S:.0f} s after the last step"))

    def run(self) -> None:
        """Opens the tracker, and hands it what is queued."""
        try:
            self._tracker.open()
            what = "open"
            while what != "close" and not self._has_ended:
                what, given = self._queue.get()
                getattr(self._tracker, what)(*given)
        except BaseException as err:  # libraries raise what they like, SystemExit too
            self.give_up(err)


class _Memory:
    """`tracking.json`: what one start of a run knows of those before it."""

    def __init__(self, path: Path, total_steps: int) -> None:
        self._path, self._lock = path, threading.Lock()
        before = read_tracking(path)
        self._ids: dict[str, str] = before["ids"]
        self.dropped: dict[str, str] = before["dropped"]
        self._total_steps = total_steps
        self._save()

    def known(self, tracker: str) -> str | None:
        """The run's id at a tracker."""
        return self._ids.get(tracker)

    def remember(self, tracker: str, name: str) -> None:
        """Keeps the run's id at a tracker."""
        with self._lock:
            self._ids[tracker] = name
        self._save()

    def note_dropped(self, name: str, reason: str) -> None:
        """Keeps that a tracker was dropped, with the last reason."""
        with self._lock:
            self.dropped[name] = reason
        self._save()

    def _save(self) -> None:
        with self._lock:
            kept = {"total_steps": self._total_steps, "ids": self._ids, "dropped": self.dropped}
            text = json.dumps(kept, indent=2) + "\n"
            with suppress(CheckpointError):  # a full disk: the run says so itself
                write_atomically(self._path, text)


def read_tracking(path: Path) -> dict[str, Any]:
    """What `tracking.json` holds: `ids` and `dropped` by tracker, `total_steps` or None.

    `resumed_by` is what goes on with the run; None where its command does.
    """
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        found = None
    found = found if isinstance(found, dict) else {}
    steps, resumed_by = found.get("total_steps"), found.get("resumed_by")
    return {
        "total_steps": steps if isinstance(steps, int) else None,
        "resumed_by": resumed_by if isinstance(resumed_by, str) else None,
        "ids": _texts(found.get("ids")),
        "dropped": _texts(found.get("dropped")),
    }


def _texts(found: Any) -> dict[str, str]:
    given = found if isinstance(found, dict) else {}
    return {key: value for key, value in given.items() if isinstance(value, str)}


def tracked_values(row: Mapping[str, Number]) -> dict[str, Number]:
    """A row of metrics as trackers get it: the Trainer's names, and finite values alone."""
    return {
        _OF_THE_TRAINER.get(name, f"train/safereg/{name}"): value
        for name, value in row.items()
        if name != "step" and math.isfinite(value)
    }


def shareable(config: Config) -> dict[str, Any]:
    """The configuration as trackers get it.

    Of absolute paths but `output_dir` only the last part; of addresses neither user nor query;
    stars in the place of what environment variables hold that are named as secrets.
    """
    secrets = secrets_of_environment()

    def shared(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shared(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [shared(each) for each in value]
        if not isinstance(value, str):
            return value
        if value.startswith(("/", "~")):
            return f".../{Path(value).name}"
        return masked(_ADDRESS.sub("***", value), secrets)

    return {**shared(config.model_dump()), "output_dir": masked(config.output_dir, secrets)}
