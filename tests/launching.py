"""Runs real launchers from tests: free ports, time limits, readable failures."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FINETUNE = ROOT / "launch" / "finetune.py"


@dataclass(frozen=True)
class Finished:
    """A launcher's exit status and everything it printed."""

    status: int
    output: str


class Launcher:
    """Starts commands in their own session, so that a kill reaches every rank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def command(self, script: Path, *arguments: str, ranks: int, launcher: str) -> list[str]:
        """The command line of a launcher on this machine with a free port."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        head = {
            "deepspeed": [
                *(sys.executable, "-m", "deepspeed.launcher.runner"),
                *("--num_gpus", str(ranks), "--master_port", port),
            ],
            "torchrun": [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nproc-per-node", str(ranks), "--master-port", port),
            ],
            "python": [sys.executable],
        }[launcher]
        return [*head, str(script), *map(str, arguments)]

    def start(
        self,
        script: Path,
        *arguments: str,
        ranks: int = 2,
        launcher: str = "deepspeed",
        env: dict[str, str] | None = None,
    ) -> tuple[subprocess.Popen, Path]:
        """A running launcher and the file it prints to."""
        self._count += 1
        log = self._folder / f"launch-{self._count}.log"
        bin_dir = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # see dump_stacks
            "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",  # ninja, deepspeed
            **(env or {}),
        }
        with log.open("wb") as sink:
            process = subprocess.Popen(
                self.command(script, *arguments, ranks=ranks, launcher=launcher),
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=self._folder,
                start_new_session=True,
            )
        return process, log

    def __call__(self, script: Path, *arguments: str, timeout_s: float = 420, **how) -> Finished:
        """Runs to the end; kills everything at the time limit."""
        process, log = self.start(script, *arguments, **how)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            dump_stacks(process)
            kill_session(process)
            raise AssertionError(f"no end after {timeout_s} s:\n{tail(log, 200)}") from None
        return Finished(status, log.read_text(errors="replace"))


def dump_stacks(process: subprocess.Popen) -> None:
    """Makes every process that hangs print where it is."""
    for pid in descendants(process.pid):
        with_ignored_missing(os.kill, pid, signal.SIGABRT)
    time.sleep(5)


def kill_session(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every process it started."""
    for pid in descendants(process.pid):
        with_ignored_missing(os.kill, pid, signal.SIGKILL)
    with_ignored_missing(os.kill, process.pid, signal.SIGKILL)
    process.wait()


def with_ignored_missing(function, *arguments) -> None:
    """Calls a function of a process that may have ended already."""
    try:
        function(*arguments)
    except ProcessLookupError:
        pass


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, children first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def tail(log: Path, lines: int = 60) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
