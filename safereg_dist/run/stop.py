"""How a run ends: asked to by a file in its folder, which every launcher leaves alone, or by a
signal to one of its ranks; of itself; or by an error, which it leaves a note of."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safereg_dist.errors import LONGEST, CheckpointError, reason_of
from safereg_dist.run.lock import holder_of
from safereg_dist.run.rank_log import masked, secrets_of_environment
from safereg_dist.storage.atomic import write_atomically

_SAVES = (signal.SIGUSR1, signal.SIGTERM)


def stop_file(folder: Path) -> Path:
    """The file that asks the run in this folder to save and end."""
    return folder / "stop"


@contextmanager
def stop_requests(folder: Path, *, looks: bool) -> Iterator[Callable[[], bool]]:
    """A block in which SIGUSR1, SIGTERM or the stop file ask for a checkpoint and a stop.

    Yields a function that says whether this rank was asked. Where `looks`, a call costs one
    `os.stat`: one rank looks, and the metrics of the step carry its answer to the others. torchrun
    hands a closed terminal's SIGHUP on and kills ranks that outlive it by 30 s: there it asks too.
    """
    was_signalled = False

    def request(*_: object) -> None:
        nonlocal was_signalled
        was_signalled = True

    numbers = (*_SAVES, signal.SIGHUP) if "TORCHELASTIC_RUN_ID" in os.environ else _SAVES
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield lambda: was_signalled or (looks and stop_file(folder).exists())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def forget_stop(folder: Path) -> None:
    """Removes the stop file: it was honoured, or was meant for an earlier run."""
    with suppress(OSError):
        stop_file(folder).unlink()


def failure_file(folder: Path) -> Path:
    """The file that says by which error the last start of the run in this folder ended."""
    return folder / "failed"


@contextmanager
def failure_noted(folder: Path) -> Iterator[None]:
    """A block whose error is noted in the folder of its run, until the next such block begins."""
    failure_file(folder).unlink(missing_ok=True)
    try:
        yield
    except Exception as err:
        if (folder / "config.yaml").is_file():  # else no run has begun, and the folder stays free
            text = f"{type(err).__name__}: {reason_of(err, LONGEST)}"
            text = masked(text, secrets_of_environment())
            with suppress(CheckpointError):  # the disk may be full
                write_atomically(failure_file(folder), text)
        raise


def request_stop(folder: Path) -> None:
    """Writes the stop file of a run.

    Raises:
        CheckpointError: not the folder of a run, a run that has ended or does not run, or a folder
            that cannot be written.
    """
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"expected the folder of a run, found no config.yaml in {folder}: give the run's "
            "output_dir (it appears when the first step begins)"
        )
    if has_ended(folder):
        raise CheckpointError(f"the run in {folder} is complete: there is nothing to stop")
    holder = holder_of(folder)
    if holder is None:
        raise CheckpointError(
            f"expected a run at work in {folder}, nobody holds its lock: there is nothing to stop"
        )
    if not holder.is_alive:
        raise CheckpointError(
            f"expected a run at work in {folder}, its process is dead ({holder.name}, silent for "
            f"{holder.silent_s:.0f} s): nobody would read the request; `safereg watch` says how it "
            "goes on"
        )
    write_atomically(stop_file(folder), "")


def wait_for_stop(folder: Path, *, timeout_s: float, show: Callable[[str], None]) -> None:
    """Returns when the run has honoured the stop file or has ended; `show` is told how far it is.

    Raises:
        CheckpointError: it has done neither after `timeout_s` seconds, or nobody runs it any more.
    """
    began, told = time.monotonic(), 0.0
    while stop_file(folder).exists() and not has_ended(folder):
        holder = holder_of(folder)
        is_left = holder is None or not holder.is_alive
        if is_left and stop_file(folder).exists() and not has_ended(folder):
            raise CheckpointError(
                f"the run in {folder} has failed or was killed before it had saved: `safereg "
                "watch` says why, and how it goes on"
            )
        waited = time.monotonic() - began
        if waited > timeout_s:
            raise CheckpointError(
                f"expected the run in {folder} to save and end within {timeout_s:.0f} s, its stop "
                "file is still there: if it runs, wait longer (--timeout); if it does not, there "
                "is nothing to stop, and its next start removes the file"
            )
        if waited >= told:
            told += 5.0
            show(f"waiting for {folder} to save and end: {waited:.0f} s, {_last_sign(folder)}")
        time.sleep(0.2)


def has_ended(folder: Path) -> bool:
    """Whether the summary, which is written last, is of the run that wrote the metrics."""
    return _changed(folder / "summary.json") > _changed(folder / "metrics.jsonl")


def _last_sign(folder: Path) -> str:
    metrics = folder / "metrics.jsonl"
    at = _changed(metrics) if metrics.is_file() and metrics.stat().st_size else 0.0  # made empty
    return f"last step logged {max(0.0, time.time() - at):.0f} s ago" if at else "no step yet"


def _changed(path: Path) -> float:
    """Time of the last change, in seconds of the epoch; 0 where there is no file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
