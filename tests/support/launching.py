"""Runs ranks and real launchers from tests: free ports, time limits, readable failures."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = ROOT / "launch" / "finetune.py"
RANK_SERVER = ROOT / "tests" / "support" / "rank_server.py"
REAL = {"preloaded": "deepspeed", "forked": "python"}
"""Launches through the rank server, and what they stand for."""


@dataclass(frozen=True)
class Finished:
    """A launcher's exit status and everything it printed."""

    status: int
    output: str


class Process(Protocol):
    """What tests need of a launch that runs: `subprocess.Popen` has it."""

    pid: int

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, at the end; raises `subprocess.TimeoutExpired`."""
        ...


class Launcher:
    """Starts commands in their own session, so that a kill reaches every rank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def command(self, script: Path | str, *arguments: str, ranks: int, launcher: str) -> list[str]:
        """The command line of a launcher on this machine with a free port."""
        port = str(free_port())
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
        script: Path | str,
        *arguments: str,
        ranks: int = 2,
        launcher: str = "preloaded",
        env: dict[str, str] | None = None,
    ) -> tuple[Process, Path]:
        """A running launch and the file it prints to.

        `preloaded` ranks have torch's variables and no launcher's process around them: see
        `rank_server`. `deepspeed`, `torchrun` and `python` (one process) are the real ones, for
        what is claimed of them. `forked` is one process without torch's variables, as `python` is,
        from the same server. Where there is a GPU all are real: CUDA does not survive a fork.
        """
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
        if launcher in REAL and torch.cuda.is_available():
            launcher = REAL[launcher]
        if launcher in REAL:
            argv = [str(script), *map(str, arguments)]
            alone = launcher == "forked"
            each = [environment] if alone else rank_environments(environment, ranks)
            return PreloadedRanks(argv, each, log), log
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

    def __call__(
        self, script: Path | str, *arguments: str, timeout_s: float = 420, **how
    ) -> Finished:
        """Runs to the end; kills everything at the time limit."""
        process, log = self.start(script, *arguments, **how)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            dump_stacks(process)
            kill_session(process)
            raise AssertionError(f"no end after {timeout_s} s:\n{tail(log, 200)}") from None
        return Finished(status, log.read_text(errors="replace"))


def rank_environments(environment: dict[str, str], ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each of so many ranks on this machine, with a free port."""
    alike = {
        **environment,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),  # else deepspeed asks numactl at every gather
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [{**alike, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


class PreloadedRanks:
    """A launch of the rank server; its process's children are the ranks."""

    def __init__(self, argv: list[str], ranks: list[dict[str, str]], log: Path) -> None:
        log.touch()
        request = {"argv": argv, "cwd": str(log.parent), "log": str(log), "ranks": ranks}
        server = rank_server()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(server))
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._answer = b""
        self._status: int | None = None
        while b"\n" not in self._answer:
            self._receive(None)
            assert self._status is None, "the rank server could not start the ranks, see above"
        self.pid = int(self._answer.split(b"\n")[0])

    def _receive(self, timeout: float | None) -> bool:
        """Whether anything came: part of the answer, or its end."""
        self._connection.settimeout(timeout)
        try:
            more = self._connection.recv(100)
        except (TimeoutError, BlockingIOError):
            return False
        self._answer += more
        lines = self._answer.split(b"\n")
        if len(lines) > 2:
            self._status = int(lines[1])
        elif not more:  # killed
            self._status = -signal.SIGKILL
        if self._status is not None:
            self._connection.close()
        return True

    def poll(self) -> int | None:
        """The status of the first rank that failed, or 0; None while they run."""
        while self._status is None and self._receive(0.0):
            pass
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """The same at the end; raises `subprocess.TimeoutExpired`."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._status is None:
            left = None if end is None else end - time.monotonic()
            if (left is not None and left <= 0) or not self._receive(left):
                assert timeout is not None
                raise subprocess.TimeoutExpired("ranks", timeout)
        return self._status


@cache
def rank_server() -> Path:
    """The socket of this process's rank server, which ends with it."""
    folder = tempfile.TemporaryDirectory(prefix="ranks-")
    path = Path(folder.name, "socket")
    server = subprocess.Popen(
        [sys.executable, str(RANK_SERVER), str(path)],
        stdin=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )

    @atexit.register
    def end() -> None:
        server.communicate()  # it ends with its input
        folder.cleanup()

    while not path.exists():
        assert server.poll() is None, "the rank server ended, see its message above"
        time.sleep(0.01)
    return path


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def dump_stacks(process: Process) -> None:
    """Makes every process that hangs print where it is."""
    for pid in descendants(process.pid):
        with_ignored_missing(os.kill, pid, signal.SIGABRT)
    time.sleep(5)


def kill_session(process: Process) -> None:
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
