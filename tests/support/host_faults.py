"""What can happen to a run over several hosts, done to it, and what came of it."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.hosts import Hosts, Launch
from support.launching import tail

STEPS = 8
SHAPE = ("tc", "qdisc", "replace", "dev", "eth0", "root")
SLOW = (*SHAPE, "tbf", "rate", "20mbit", "burst", "32kbit", "latency", "400ms")


def write_run(folder: Path) -> None:
    """A model, rows and `run.yaml`: dropout, a moving average, checkpoints; `STEPS` steps."""
    model = tiny_model(seed=0, num_hidden_layers=2, attention_dropout=0.2)
    save_model(folder / "model", model)
    write_jsonl(folder / "train.jsonl", random_rows(60))
    (folder / "run.yaml").write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{train: {folder / 'train.jsonl'}}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "regularizer: {schedule: linear, granularity: batch, ema: 0.6}\n"
        "optimizer: {lr: 1.0e-3}\n"
        f"train: {{steps: {STEPS}, precision: fp32, micro_batch_size: 2, grad_accum_steps: 2, "
        "save_every: 2}\n"
        "engine: {timeout_s: 30}\n"
        f"output_dir: {folder / 'out'}\n"
    )


def messages(output: str) -> list[str]:
    """Our own lines in what launchers printed, without pdsh's name of the host."""
    found = re.findall(r"(?:^|\r|\n)(?:\S+: )?safereg: ([^\r\n]*)", output)
    return [line.strip() for line in found]


@dataclass(frozen=True)
class Fault:
    """One thing that happens to the last host, and its mending."""

    strike: Callable[[Hosts, int], object]
    mend: Callable[[Hosts, int], object] = lambda hosts, host: None
    ends: bool = True
    """Whether the run has to end."""


def _kill_rank(hosts: Hosts, host: int) -> None:
    hosts.run(host, "kill", "-KILL", hosts.rank_processes(host)[-1])


FAULTS = {
    "nothing": Fault(lambda hosts, host: None, ends=False),
    "SIGKILL of a rank": Fault(_kill_rank),
    "SIGKILL of rank 0": Fault(lambda hosts, host: _kill_rank(hosts, 0)),
    "link down": Fault(Hosts.cut, Hosts.join),
    "host without power": Fault(Hosts.power_off, Hosts.boot),
    "SIGKILL of sshd": Fault(
        lambda hosts, host: hosts.run(host, "pkill", "-KILL", "-x", "sshd"), ends=False
    ),
    "link at 20 Mbit/s": Fault(
        lambda hosts, host: hosts.run(host, *SLOW),
        lambda hosts, host: hosts.run(host, "tc", "qdisc", "del", "dev", "eth0", "root"),
        ends=False,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How a launch ended after a fault."""

    ranks_ended_s: float
    """From the fault until no rank was left on any host."""
    seconds: float
    """Until no launcher was left either."""
    status: int
    lines: list[str]
    output: str


def strike(
    hosts: Hosts, fault: Fault, arguments: Sequence[object], out: Path, **how: Any
) -> Outcome:
    """A launch that meets the fault after its third step, and its end on all hosts; mended."""
    launch = hosts.start(arguments, **how)
    _wait_for_steps(out, 3, launch)
    started = time.monotonic()
    fault.strike(hosts, hosts.count - 1)
    try:
        _wait_for_ranks(hosts, launch)
        ranks_ended = time.monotonic() - started
        status = hosts.wait(launch)
        seconds = time.monotonic() - started
    finally:
        fault.mend(hosts, hosts.count - 1)
    return Outcome(ranks_ended, seconds, status, messages(launch.output), launch.output)


def _wait_for_ranks(hosts: Hosts, launch: Launch, timeout_s: float = 420) -> None:
    """Polls until no host has a rank."""
    end = time.monotonic() + timeout_s
    while hosts.has_ranks():
        assert time.monotonic() < end, f"ranks after {timeout_s} s:\n{launch.output}"
        time.sleep(0.1)


def _wait_for_steps(out: Path, count: int, launch: Launch, timeout_s: float = 300) -> None:
    """Polls until so many steps are logged."""
    end, path = time.monotonic() + timeout_s, out / "metrics.jsonl"
    while not path.is_file() or path.read_text().count("\n") < count:
        logs = "\n".join(tail(log) for log in launch.logs)
        assert launch.poll() is None, f"ended before the fault:\n{logs}"
        assert time.monotonic() < end, f"no step after {timeout_s} s:\n{logs}"
        time.sleep(0.01)
