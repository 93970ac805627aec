"""Tries every way to stop a run under every launcher, and writes what happened.

    python benchmarks/stops.py --out benchmarks/results/stops.csv [--only LAUNCHER] [--way WAY]
        [--hosts SCRIPT]    makes hosts for pdsh: up DIR N, exec DIR I COMMAND, down DIR; needs root
    python benchmarks/stops.py --table benchmarks/results/stops.csv        as the docs show it

Two ranks of a tiny model train, the stop is tried, and the processes are watched. Columns:

    launcher, way      what ran, and what was done to it
    outcome            saved | trains on | lost: a checkpoint was written and the ranks ended, no
                       rank took notice for 40 s, or they ended without a checkpoint
    launcher_status    exit status of the outermost process; negative: the signal that ended it
    rank_statuses      of the ranks, from their files in RUN/logs; `-` where a rank was killed
"""

import argparse
import csv
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # `support`

from support.builders import write_run  # noqa: E402
from support.launching import FINETUNE, free_port, with_ignored_missing  # noqa: E402

WATCHED_S = 40.0  # launchers kill after 30 s
PYTHON = sys.executable
DEEPSPEED = (PYTHON, "-m", "deepspeed.launcher.runner")
COLUMNS = ("launcher", "way", "outcome", "launcher_status", "rank_statuses", "versions")


class Trial:
    """One run that trains, its processes, and what became of them."""

    def __init__(self, command: list[str], out: Path, *, terminal: bool = False) -> None:
        self.out, self.terminal = out, -1
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        words = [*command, f"output_dir={out}"]
        if terminal:
            self.pid, self.terminal = pty.fork()
            if self.pid == 0:
                os.execvpe(words[0], words, env)
        else:
            sink = (out.parent / f"{out.name}.log").open("wb")
            self.pid = subprocess.Popen(
                words, env=env, stdout=sink, stderr=sink, start_new_session=True
            ).pid
        self.status: int | None = None
        while self._steps() < 3:
            assert not self._has_ended(), f"ended before it could be stopped: see {out.parent}"
            self._read_terminal()
            time.sleep(0.05)

    def processes(self, *, ranks: bool) -> list[int]:
        """The ranks, or what launched them, by the command line that names the run."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if f"output_dir={self.out}" in words:
                is_rank = not any(
                    word in ("deepspeed.launcher.launch", "deepspeed.launcher.runner")
                    or word == "torch.distributed.run"
                    or word.endswith(("hosts.sh", "nsenter", "pdsh", "ssh"))
                    for word in words
                )
                if is_rank == ranks:
                    found.append(int(entry.name))
        return sorted(found)

    def launch_process(self) -> int:
        """DeepSpeed's `launch` on this host, or on the first of several."""
        return self._running("deepspeed.launcher.launch")[0]

    def outermost(self) -> int:
        """What the user has started: within a host, the runner."""
        return (*self._running("deepspeed.launcher.runner"), self.pid)[0]

    def _running(self, module: str) -> list[int]:
        """Processes of ours that are Python with this module, not what carries its command line."""
        start = f"{PYTHON}\0"
        texts = {
            pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in self.processes(ranks=False)
        }
        return [pid for pid, text in texts.items() if text.startswith(start) and module in text]

    def watch(self) -> dict[str, str]:
        """What happened since the stop."""
        began = time.monotonic()
        while time.monotonic() - began < WATCHED_S and not (
            self._has_ended() and not self.processes(ranks=True)
        ):
            self._read_terminal()
            time.sleep(0.1)
        alive = self.processes(ranks=True)
        while not (alive or self._has_ended()) and time.monotonic() - began < 4 * WATCHED_S:
            time.sleep(0.1)  # on a busy machine
        saved = any((self.out / "checkpoint").glob("step-*"))
        outcome = "trains on" if alive else "saved" if saved else "lost"
        if alive:
            before = self._steps()
            time.sleep(15.0)  # several steps, on a busy machine too
            outcome += "" if self._steps() > before else " (stuck)"
        for pid in alive + self.processes(ranks=False):
            with_ignored_missing(os.kill, pid, signal.SIGKILL)
        launcher = "-" if self.status is None else str(self.status)
        return {
            "outcome": outcome,
            "launcher_status": launcher,
            "rank_statuses": " ".join(map(self._rank_status, range(len(self._logs())))),
        }

    def _logs(self) -> list[Path]:
        return sorted((self.out / "logs").glob("rank*.log"))

    def _rank_status(self, rank: int) -> str:
        _, found, after = self._logs()[rank].read_text().rpartition("ended with status ")
        return after.split()[0] if found else "-"

    def _steps(self) -> int:
        metrics = self.out / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    def _has_ended(self) -> bool:
        if self.status is None:
            pid, how = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(how) if pid else None
        return self.status is not None

    def _read_terminal(self) -> None:
        if self.terminal >= 0:
            os.set_blocking(self.terminal, False)
            try:
                while os.read(self.terminal, 65536):
                    pass
            except OSError:
                pass

    def close_terminal(self) -> None:
        """What a closed window or a lost connection does."""
        os.close(self.terminal)
        self.terminal = -1


def stop_file(trial: Trial) -> None:
    """The command on any host."""
    subprocess.run([PYTHON, "-m", "safereg_dist", "stop", str(trial.out)], check=True)


def sent(number: signal.Signals, to: Callable[[Trial], int]) -> Callable[[Trial], None]:
    """A signal to one process."""
    return lambda trial: os.kill(to(trial), number)


def first_rank(trial: Trial) -> int:
    """Any rank would do."""
    return trial.processes(ranks=True)[0]


WAYS: dict[str, Callable[[Trial], None]] = {
    "safereg stop": stop_file,
    **{
        f"{number.name} to the outermost process": sent(number, Trial.outermost)
        for number in (signal.SIGTERM, signal.SIGUSR1)
    },
    "terminal closed": Trial.close_terminal,
    "SIGTERM to deepspeed's launch": sent(signal.SIGTERM, Trial.launch_process),
    "SIGUSR1 to deepspeed's launch": sent(signal.SIGUSR1, Trial.launch_process),
    "SIGUSR1 to one rank": sent(signal.SIGUSR1, first_rank),
}


def launchers(config: Path, hosts: tuple[Path, Path] | None) -> dict[str, list[str]]:
    """Launcher -> command, without the output folder."""
    run = [str(FINETUNE), str(config)]
    port = str(free_port())
    found = {
        "safereg train": [PYTHON, *run, "engine.name=single"],
        "deepspeed, one host": [*DEEPSPEED, "--num_gpus", "2", "--master_port", port, *run],
        "torchrun": [
            *(PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", port, *run),
        ],
        "torchrun --signals-to-handle ...": [
            *(PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", port, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1"),
            *run,
        ],
    }
    if hosts is not None:
        script, folder = hosts
        over = ["--hostfile", str(folder / "hostfile"), *run]
        found["deepspeed, 2 hosts (pdsh)"] = [
            *("bash", str(script), "exec", str(folder), "0", *DEEPSPEED, *over)
        ]
    return found


def is_apt(launcher: str, way: str) -> bool:
    """Whether a way says something of a launcher."""
    if "launch" in way.split(" to ")[-1]:
        return launcher.startswith("deepspeed")
    if launcher.startswith("torchrun "):
        return way.startswith("SIGUSR1 to the")
    return not ("hosts" in launcher and way == "terminal closed")


def make_world(folder: Path) -> Path:
    """A run that takes minutes."""
    train = {"steps": 100000, "precision": "fp32", "micro_batch_size": 2}
    return write_run(folder, rows=24, train=train)


def table(path: Path) -> str:
    """The rows in Markdown: a launcher's ways together."""
    lines = [
        "| launcher | way to stop | what happened | ranks | launcher's status |",
        "|---" * 5 + "|",
    ]
    with path.open(newline="") as file:
        for row in sorted(csv.DictReader(file), key=lambda row: row["launcher"]):
            cells = (row["launcher"], row["way"], row["outcome"], row["rank_statuses"] or "-")
            lines.append(f"| {' | '.join(cells)} | {row['launcher_status']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all trials; each row is written when it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/stops.csv")
    parser.add_argument("--table", type=Path, metavar="CSV", help="only prints this one")
    parser.add_argument("--only", default="", help="launchers whose name begins so")
    parser.add_argument("--way", default="", help="ways whose name begins so")
    parser.add_argument("--hosts", type=Path, help="a script that makes hosts (needs root)")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(arguments.table), end="")
        return
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    with tempfile.TemporaryDirectory() as name, arguments.out.open("w", newline="") as file:
        folder = Path(name)
        config = make_world(folder)
        hosts = None
        if arguments.hosts is not None:
            hosts = arguments.hosts, folder / "hosts"
            subprocess.run(["bash", hosts[0], "up", hosts[1], "2"], check=True)
        rows = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        rows.writeheader()
        number = 0
        try:
            for way, act in WAYS.items():
                for launcher, command in launchers(config, hosts).items():
                    chosen = launcher.startswith(arguments.only) and way.startswith(arguments.way)
                    if not (chosen and is_apt(launcher, way)):
                        continue
                    number += 1
                    out = folder / f"run{number}"
                    trial = Trial(command, out, terminal=way == "terminal closed")
                    act(trial)
                    row = {"launcher": launcher, "way": way, **trial.watch(), "versions": versions}
                    rows.writerow(row)
                    file.flush()
                    print(row, flush=True)
        finally:
            if hosts is not None:
                subprocess.run(["bash", hosts[0], "down", hosts[1]], check=False)


if __name__ == "__main__":
    main()
