"""The same run in every stack: how far losses and gradients are from float64, and who holds what.

    python benchmarks/bench_stacks.py [--only NAME] [--check] [--megatron FOLDER] [--out FILE.csv]

Writes benchmarks/results/stacks.csv, and goes on where it was stopped: runs whose row is there are
left out (delete the file to measure again). With a GPU every stack runs on one rank (NCCL), several
at once, in float32 and bf16; a run that fails has its reason on the screen, and the others go on.
Columns: the stack, its library's version, ranks, accumulation, precision; relative errors of the
first loss, of the worst gradient (in a parameter's own norm) and of the loss after 20 steps, over
whole logits in float64; what runs the reference; bytes of parameters of policy and reference on a
rank, over the share of what that stack shards (Megatron: over twice the policy's); the device.
`--megatron`: an unpacked wheel of megatron-core, whose rows come beside those of the installed one.
`--check` exits with 1 where an error is above 1e-5 (loss) or 1e-4 (gradient), or where one of four
ranks that shard their weights holds over 5 % more than its share.
"""

import argparse
import csv
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / p) for p in ("tests", "tests/distributed", "kernels/tests")]

import torch  # noqa: E402
from megatron_cases import EXPERTS, LAYOUTS, errors_of, normaliser  # noqa: E402
from megatron_cases import facts as facts_of  # noqa: E402
from stack_cases import (  # noqa: E402
    RUNS,
    STEPS,
    Errors,
    StackRun,
    compared,
    expected,
    write_expected,
    write_models,
)
from support.launching import (  # noqa: E402
    Launcher,
    descendants,
    rank_environments,
    with_ignored_missing,
)
from tqdm import tqdm  # noqa: E402

WORKER = ROOT / "tests" / "distributed" / "stack_worker.py"
OUT = ROOT / "benchmarks" / "results" / "stacks.csv"
COLUMNS = (
    "stack",
    "library_version",
    "ranks",
    "accumulation",
    "precision",
    "first_loss_relative_error",
    "gradient_relative_error",
    "loss_after_20_relative_error",
    "reference",
    "parameter_bytes_over_ideal",
    "device",
)
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 0.2)}
"""By precision, largest error of the first loss and of a gradient."""
KEY = ("stack", "device", "ranks", "accumulation", "precision")
MEGATRON_KEY = ("stack", "library_version", "device", "precision")
GPU = torch.cuda.is_available()
DEVICE = torch.cuda.get_device_name() if GPU else "cpu"
AT_ONCE = max(1, (os.cpu_count() or 1) - 1) if GPU else 1
"""Runs at the same time: a GPU's are one rank each, and mostly imports."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the stacks whose name holds this")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--megatron", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    table = Table(args.out)
    chosen = [run for run in all_runs() if args.only in run[0].stack and not table.has(*run)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder)
        for name, how in (("full", {}), ("lora", {"lora": True}), ("packed", {"repeats": True})):
            write_expected(folder, expected(folder, **how), name)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            running = [pool.submit(one, folder, *run) for run in chosen]
            for run, found in tqdm(zip(chosen, running, strict=True), "stacks", len(running)):
                table.add(lambda run=run, found=found: [row_of(*run, *found.result())], KEY)
        if args.only in "megatron":
            table.add(lambda: megatron_rows(folder, args.megatron), MEGATRON_KEY)
    bad = [row for row in table.rows if not is_within(row)]
    for row in bad:
        print("above the limits:", *row.values())
    return int(table.has_failed or (args.check and bool(bad)))


def end_with_all_runs(*_: object) -> None:
    """At SIGTERM: what was started would go on, and take the device from whoever comes next."""
    for process in descendants(os.getpid()):
        with_ignored_missing(os.kill, process, signal.SIGKILL)
    os._exit(143)


class RunError(Exception):
    """A run ended with an error, or lacks gradients."""


class Table:
    """The rows that are known, and their file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
        self.has_failed = False

    def has(self, run: StackRun, precision: str) -> bool:
        """Whether a run's row is there."""
        wanted = (run.stack, DEVICE, str(run.ranks), str(run.accumulation), precision)
        return any(tuple(str(row[name]) for name in KEY) == wanted for row in self.rows)

    def add(self, measure: Callable[[], Iterable[dict]], key: tuple[str, ...]) -> None:
        """Writes and prints each row as it comes, in the place of an older one of its key."""
        try:
            for row in measure():
                self.rows = [r for r in self.rows if [r[k] for k in key] != [row[k] for k in key]]
                self.rows.append(row)
                print(*row.values(), sep=",", flush=True)
                self._write()
        except RunError as failure:
            self.has_failed = True
            print(failure, flush=True)

    def _write(self) -> None:
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def all_runs() -> list[tuple[StackRun, str]]:
    """Every run and its precision; on a GPU each stack once, on one rank."""
    if not GPU:
        return [(run, precision) for run in RUNS for precision in precisions(run)]
    once = {run.stack: run._replace(ranks=1) for run in RUNS if run.accumulation == 4}
    return [(run, precision) for run in once.values() for precision in precisions(run)]


def megatron_rows(folder: Path, newest: Path | None) -> Iterator[dict]:
    """The rows of every layout, measured now, of the installed version and of an unpacked one."""
    worker, launch = WORKER.with_name("megatron_worker.py"), Launcher(folder)
    runs = [(name, *run, "fp32", ()) for name, run in LAYOUTS.items()]
    runs.append(("ep2", 2, (), "fp32", EXPERTS))
    if GPU:
        runs = [("tp1", 1, (), "fp32", ()), ("tp1", 1, ("--bf16",), "bf16", ())]
    for home in [None, *([] if newest is None else [newest])]:
        environment = {} if home is None else {"MEGATRON_CORE": str(home)}
        for name, ranks, options, precision, model in tqdm(runs, "megatron"):
            models, out = folder / f"megatron{len(model)}", folder / "megatron-out"
            if not models.is_dir():
                models.mkdir()
                made = launch(worker, "oracle", models, "--steps", STEPS, *model)
                if made.status:
                    raise RunError(f"megatron's oracle: {made.output[-3000:]}")
            how = [models, out, "--steps", STEPS, *options, *model]
            finished = run_ranks(launch, worker, name, *how, ranks=ranks, environment=environment)
            if finished.status:
                raise RunError(f"megatron-{name}: {finished.output[-3000:]}")
            errors = errors_of(out, ranks, models, "mixed", normaliser(options))
            if errors.missing:
                raise RunError(f"megatron-{name}: gradients of {errors.missing} are missing")
            known = facts_of(out, ranks - 1)
            policy, reference = known["bytes"]
            run = StackRun(
                f"megatron-{name.removeprefix('pp2-') if 'vpp' in name else name}",
                *(ranks, 8 // (2 if "dp2" in name or "ep2" in name else 1), "megatron-core"),
                "same layout",
            )
            facts = {"parameter_bytes": [policy + reference, 2 * policy * ranks]}
            version = f"megatron-core {known['version']}"
            yield row_of(run, precision, errors, facts) | {"library_version": version}


def run_ranks(launch: Launcher, worker: Path, *words, ranks: int, environment=None):
    """A worker on its ranks; on a GPU the one rank has no launcher around it."""
    environment = environment or {}
    if not GPU:
        return launch(worker, *words, ranks=ranks, env=environment)
    alone = rank_environments(environment, 1)[0]
    return launch(worker, *words, launcher="python", env=alone)


def is_within(row: dict) -> bool:
    """Whether a row keeps the limits."""
    loss, gradient = TOLERANCE[row["precision"]]
    bytes_kept = row["ranks"] not in (4, "4") or float(row["parameter_bytes_over_ideal"]) <= 1.05
    return (
        float(row["first_loss_relative_error"]) <= loss
        and float(row["gradient_relative_error"]) <= gradient
        and bytes_kept
    )


def precisions(run: StackRun) -> list[str]:
    """bf16 too in some: autocast in Trainers, bf16 weights in our own engines."""
    on_cpu = ("trainer-ddp", "sfttrainer", "fsdp2", "deepspeed-zero-3")
    is_loop = run.stack.startswith(("raw", "accelerate", "deepspeed-zero-1", "deepspeed-zero-2"))
    of_few = run.stack in on_cpu and run.accumulation == 1 and run.ranks < 3
    in_bf16 = not is_loop if GPU else of_few
    return ["fp32", "bf16"] if in_bf16 else ["fp32"]


def one(folder: Path, run: StackRun, precision: str) -> tuple[Errors, dict]:
    """Errors and facts of one run."""
    own = folder / f"{run.stack}-{run.ranks}-{run.accumulation}-{precision}"
    own.mkdir()
    out = own / "out.safetensors"
    how = ["--accumulation", str(run.accumulation), "--precision", precision]
    result = run_ranks(Launcher(own), WORKER, run.stack, folder, out, *how, ranks=run.ranks)
    if result.status:
        raise RunError(f"{run.stack} {precision}: {result.output[-3000:]}")
    errors = compared(out, folder / f"{run.oracle}.safetensors")
    if errors.missing:
        raise RunError(f"{run.stack}: gradients of {sorted(errors.missing)[:3]} are missing")
    return errors, json.loads(out.with_suffix(".json").read_text())


def row_of(run: StackRun, precision: str, errors: Errors, facts: dict) -> dict:
    """A row of the table."""
    own, whole = facts["parameter_bytes"]
    return {
        "stack": run.stack,
        "library_version": f"{run.library} {version(run.library)}",
        "ranks": run.ranks,
        "accumulation": run.accumulation,
        "precision": precision,
        "first_loss_relative_error": f"{errors.first_loss:.1e}",
        "gradient_relative_error": f"{errors.gradient:.1e}",
        "loss_after_20_relative_error": f"{errors.last_loss:.1e}",
        "reference": run.reference,
        "parameter_bytes_over_ideal": f"{own / (whole / run.ranks):.3f}",
        "device": DEVICE,
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, end_with_all_runs)
    sys.exit(main())
