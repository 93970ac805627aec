"""What a run folder shows of its run, from outside, while it is written.

Nothing here writes or waits. A last line that is cut is left for the next look, and where a run
that was resumed has gone back, so do the rows.
"""

import re
import statistics
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from safereg_dist.errors import printable
from safereg_dist.run.alerts import ALERTS_NAME, read_alerts
from safereg_dist.run.lock import holder_of
from safereg_dist.run.stop import failure_file, has_ended, stop_file
from safereg_dist.run.tracking import TRACKING_NAME, read_tracking
from safereg_dist.storage.json_text import json_object

WATCHED = ("loss", "risky_fraction", "divergence", "canary_refusal")
"""The metrics that are shown over time."""
ENDED = ("complete", "ended early")
"""States, and a summary's `status`, of runs that nobody goes on with."""
_RECENT = 20
"""Steps whose median time says how long the rest will take."""
_LOG_BYTES = 64 << 10
_LOG_FILES = 64
_LINE = re.compile(r"\S+Z (\S+ rank\d+) (?:WARNING|ERROR|CRITICAL) (.*)")


class MetricsTail:
    """The rows of a `metrics.jsonl`, read on from where the last look ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.series: dict[str, list[float]] = {name: [] for name in WATCHED}
        """Values of `WATCHED`, one for each row that has one."""
        self.last: dict[str, Any] = {}
        """The newest row."""
        self.step_times: deque[float] = deque(maxlen=_RECENT)
        """Seconds, of the newest rows."""
        self._end, self._line = 0, b""

    def read(self) -> None:
        """Takes in the whole lines that have come since."""
        try:
            with self._path.open("rb") as file:
                if not self._is_grown(file):
                    self._forget()
                file.seek(self._end)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._end, self._line = self._end + len(line), line
                    self._add(json_object(line) or {})
        except OSError:
            return

    def _is_grown(self, file: IO[bytes]) -> bool:
        """Whether the last line that was read is still where it was."""
        file.seek(self._end - len(self._line))
        return file.read(len(self._line)) == self._line

    def _add(self, row: dict[str, Any]) -> None:
        if not isinstance(row.get("step"), int):
            return
        self.last = row
        for name, values in self.series.items():
            if isinstance(row.get(name), int | float):
                values.append(float(row[name]))
        if isinstance(row.get("step_time_s"), int | float):
            self.step_times.append(row["step_time_s"])


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run at one moment."""

    state: str
    """`waiting`, `starting`, `running`, `stopping`, `stopped`, `failed`, `dead`, `complete` or
    `ended early`."""
    note: str
    """What the state means here."""
    step: int
    """Steps done."""
    total_steps: int | None
    seconds_left: float | None
    """About; None where it does not run or nothing is known."""
    checkpoints: list[str]
    """Their names, oldest first."""
    alerts: list[str]
    """Texts, oldest first."""
    warnings: list[str]
    """Of all ranks, the newest last: rank and text."""
    dropped: dict[str, str]
    """Tracker -> why it is told no more."""


def look_at(folder: Path, tail: MetricsTail) -> RunView:
    """The run in a folder as it is now; `tail` is that of its metrics, and is read on."""
    tail.read()
    state, note = state_of(folder)
    known = read_tracking(folder / TRACKING_NAME)
    step, total = tail.last.get("step", -1) + 1, known["total_steps"]
    left = None
    if state == "running" and total is not None and tail.step_times:
        left = max(0, total - step) * statistics.median(tail.step_times)
    return RunView(
        state=state,
        note=printable(note),
        step=step,
        total_steps=total,
        seconds_left=left,
        checkpoints=checkpoints_in(folder),
        alerts=[printable(alert["text"], 200) for alert in read_alerts(folder / ALERTS_NAME)],
        warnings=warnings_in(folder / "logs"),
        dropped={printable(k, 40): printable(v, 200) for k, v in known["dropped"].items()},
    )


def checkpoints_in(folder: Path) -> list[str]:
    """The names of a run's checkpoints, oldest first; also of a run that the Trainer drives."""
    found = [*folder.glob("checkpoint/step-*"), *folder.glob("checkpoint-*")]
    steps = {path.name: path.name.rpartition("-")[2] for path in found}
    return sorted((name for name in steps if steps[name].isdecimal()), key=lambda n: int(steps[n]))


def state_of(folder: Path) -> tuple[str, str]:
    """The state of the run in a folder, and half a sentence about it."""
    holder = holder_of(folder)
    if not (folder / "config.yaml").is_file():
        if holder is not None and holder.is_alive:
            return "starting", f"{holder.name} builds it"
        return "waiting", f"no run in {folder} yet"
    if has_ended(folder):
        files = [name for name in ("summary.json", "report.html") if (folder / name).is_file()]
        summary = json_object(_end_of(folder / "summary.json").encode()) or {}
        is_early = summary.get("status") == ENDED[1]
        return ENDED[is_early], f"see {' and '.join(files)}"
    if holder is None:
        if failure := _end_of(failure_file(folder)):
            return "failed", failure
        return "stopped", how_it_goes_on(folder)
    if not holder.is_alive:
        ago = timedelta(seconds=round(holder.silent_s))
        how = how_it_goes_on(folder)
        return "dead", f"no sign of life of {holder.name} for {ago}; {how}"
    if stop_file(folder).exists():
        return "stopping", "it saves after this step, and ends"
    return "running", holder.name


OF_A_LOOP = "recorder.start(FOLDER, step=DONE)"
"""How a loop of one's own goes on with its run; the same command may begin it anew."""


def how_it_goes_on(folder: Path) -> str:
    """Half a sentence: what goes on with the run in a folder that has saved and ended."""
    resumed_by = read_tracking(folder / TRACKING_NAME)["resumed_by"]
    if resumed_by is None:
        return "the same command goes on with it"
    saved = checkpoints_in(folder)
    if resumed_by == OF_A_LOOP:
        return f"{OF_A_LOOP} goes on from what recorder.save wrote"
    if not saved:
        return "it has no checkpoint, and would begin anew"
    return f"{printable(resumed_by, 40)} goes on from {saved[-1]}"


def warnings_in(folder: Path) -> list[str]:
    """The warnings and errors at the ends of the ranks' logs, in the order of their times."""
    try:
        files = sorted(folder.glob("rank*.log"), key=lambda path: path.stat().st_mtime)
    except OSError:
        return []
    found = []
    for path in files[-_LOG_FILES:]:
        for line in _end_of(path).splitlines():
            said = _LINE.match(line)
            if said is not None and "safereg: alert at step" not in line:
                found.append((line.split()[0], f"{said[1]}: {said[2]}"))
    return [printable(text, 200) for _, text in sorted(found)]


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
