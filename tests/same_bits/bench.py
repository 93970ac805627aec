"""What a case may do: run the commands of a tree, and keep what must be the same bits."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

TIMEOUT_S = 300
CHANGING = (
    *("step_time_s", "tokens_per_s", "peak_memory_bytes", "seconds", "save_blocked_s"),
    *("versions", "safereg_dist_version", "created", "hash", "head", "path", "out"),
)
"""Fields that differ between two runs of the same code, or only say where and when it ran. The
ledger's hashes follow from its rows, and change with its format."""
EXIT_REQUEUE = 75


class CaseError(Exception):
    """A command ended otherwise than its case expects; the message has the end of its output."""


@dataclass(frozen=True)
class Bench:
    """One case at work: `work` is its own empty folder, `out` is where its results go."""

    tree: Path
    world: Path
    work: Path
    out: Path

    def train(self, *overrides: str, ranks: int = 1, deepspeed: bool = False) -> None:
        """One training run, and keeps what it wrote. `deepspeed` takes that launcher."""
        self.run_training(*overrides, ranks=ranks, deepspeed=deepspeed)
        self.keep_run()

    def run_training(self, *overrides: str, ranks: int = 1, deepspeed: bool = False) -> None:
        """One training run to its end."""
        words = ["launch/finetune.py", *self._training(overrides)]
        if deepspeed:
            head = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
            self._wait(self._start([[*head, "--master_port", str(free_port()), *words]]))
        else:
            self._wait(self._start_ranks(words, ranks))

    def interrupted_training(self, *overrides: str, ranks: int, after_steps: int) -> None:
        """A run that SIGUSR1 ends after its checkpoint, some steps after `after_steps`."""
        processes = self._start_ranks(["launch/finetune.py", *self._training(overrides)], ranks)
        metrics, end = self.work / "run" / "metrics.jsonl", time.monotonic() + TIMEOUT_S
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < after_steps:
            if time.monotonic() > end or any(p.poll() is not None for p in processes):
                break
            time.sleep(0.002)
        processes[-1].send_signal(signal.SIGUSR1)
        self._wait(processes, status=EXIT_REQUEUE)

    def verb(self, *words: object, ranks: int = 1) -> None:
        """`python -m safereg_dist WORDS` to its end."""
        self._wait(self._start_ranks(["-m", "safereg_dist", *map(str, words)], ranks))

    def config(self, name: str = "base.yaml", **changes: Any) -> Path:
        """The configuration that every training run of a case starts from."""
        path = self.work / name
        path.write_text(yaml.safe_dump({**base_config(self.world), **changes}))
        return path

    def keep_run(self) -> None:
        """Metrics, ledger and exported weights of the run."""
        run = self.work / "run"
        self.keep_rows("metrics", read_jsonl(run / "metrics.jsonl"))
        self.keep_rows("ledger", read_jsonl(run / "ledger.jsonl"))
        self.keep_tensors("weights", run / "model")

    def keep_rows(self, name: str, rows: Iterable[Any]) -> None:
        """Rows as JSON lines, without what changes from run to run."""
        lines = [json.dumps(steady(row), sort_keys=True) + "\n" for row in rows]
        (self.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    def keep_json(self, name: str, path: Path) -> None:
        """A file of one JSON value, as one line."""
        self.keep_rows(name, [json.loads(path.read_text(encoding="utf-8"))])

    def keep_tensors(self, name: str, folder: Path) -> None:
        """A line with a hash for each tensor in the folder; the tensors too, for tolerances."""
        rows = []
        for path in sorted(folder.glob("*.safetensors")):
            for key, tensor in sorted(load_file(path).items()):
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                facts = {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
                digest = hashlib.sha256(raw).hexdigest()
                rows.append({"file": path.name, "tensor": key, **facts, "sha256": digest})
            (self.out / name).mkdir(exist_ok=True)
            shutil.copy(path, self.out / name / path.name)
        if not rows:
            raise CaseError(f"no tensors in {folder}")
        self.keep_rows(name, rows)

    def _training(self, overrides: tuple[str, ...]) -> list[str]:
        return [str(self.config()), f"output_dir={self.work / 'run'}", *overrides]

    def _start_ranks(self, words: list[str], ranks: int) -> list[subprocess.Popen]:
        """Each rank as a process with torchrun's environment: no launcher to wait for."""
        if ranks == 1:
            return self._start([words])
        place = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = free_port()
        return self._start(
            [words] * ranks, [{**place, "RANK": r, "LOCAL_RANK": r} for r in range(ranks)]
        )

    def _start(
        self, commands: list[list[str]], places: list[dict[str, Any]] | None = None
    ) -> list[subprocess.Popen]:
        processes = []
        for rank, words in enumerate(commands):
            place = {k: str(v) for k, v in (places[rank] if places else {}).items()}
            with (self.work / "log").open("ab") as log:
                log.write(f"$ python {shlex.join(words)}  # {place}\n".encode())
                log.flush()
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *words],
                        cwd=self.tree,
                        env={**self._environment(), **place},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        return processes

    def _environment(self) -> dict[str, str]:
        return tree_environment(self.tree) | {"SAFEREG_CACHE": str(self.work / "cache")}

    def _wait(self, processes: list[subprocess.Popen], status: int = 0) -> None:
        end = time.monotonic() + TIMEOUT_S
        try:
            found = [p.wait(max(1.0, end - time.monotonic())) for p in processes]
        except subprocess.TimeoutExpired:
            found = ["timeout"]
        if found == [status] * len(processes):
            return
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = (self.work / "log").read_text(errors="replace").replace("\r", "\n").splitlines()
        end_of_log = "\n    ".join(lines[-30:])
        raise CaseError(f"expected status {status}, got {found}:\n    {end_of_log}")


def base_config(world: Path) -> dict[str, Any]:
    """Float32, ZeRO-3, small batches; risk from the column of `column.jsonl`, nothing refused."""
    return {
        "model": str(world / "base"),
        "data": {"train": str(world / "column.jsonl"), "max_length": 64},
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "optimizer": {"lr": 1.0e-3, "warmup_ratio": 0.05, "min_lr_ratio": 0.1, "beta2": 0.98},
        "train": {"steps": 6, "micro_batch_size": 3, "precision": "fp32"},
        "engine": {"name": "deepspeed"},
        "output_dir": "unset",
    }


def tree_environment(tree: Path) -> dict[str, str]:
    """The environment in which a process runs the code of `tree` and of no other."""
    wanted = {
        "PYTHONPATH": f"{tree / 'kernels'}{os.pathsep}{tree}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, **wanted}


def steady(value: Any) -> Any:
    """The value without the fields that change from run to run, at any depth."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in CHANGING}
    if isinstance(value, list):
        return [steady(entry) for entry in value]
    return value


def read_jsonl(path: Path) -> list[Any]:
    """The values of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
