"""How far a run is, from its folder, while its processes run."""

import time
from collections.abc import Callable
from pathlib import Path

from support.launching import Process, tail


def wait_for(
    condition: Callable[[], bool], process: Process, log: Path, timeout_s: float = 240
) -> None:
    """Polls until the condition holds while the process runs."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"ended before it could be killed:\n{tail(log)}"
        assert time.monotonic() < end, f"nothing to kill after {timeout_s} s:\n{tail(log)}"
        time.sleep(0.001)


def steps_logged(out: Path) -> int:
    """Rows of its metrics."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def last_checkpoint(out: Path) -> int:
    """The last step that is saved; 0 where none is."""
    return max((int(p.name[5:]) for p in (out / "checkpoint").glob("step-*")), default=0)
