"""The same run in every stack: how far losses and gradients are from float64, and who holds what.

    python benchmarks/bench_stacks.py [--only NAME] [--check] [--megatron FOLDER]

Writes benchmarks/results/stacks.csv, and goes on where it was stopped: runs whose row is there are
left out (delete the file to measure again). Columns: the stack, its library's version, ranks,
accumulation, precision; relative errors of the first loss, of the worst gradient (in a parameter's
own norm) and of the loss after 20 steps, against whole logits in float64; what runs the reference;
bytes of parameters of policy and reference on a rank, over the share of what that stack shards
(Megatron: over twice the policy's). `--megatron`: an unpacked wheel of megatron-core, whose rows
come beside those of the installed one.
`--check` exits with 1 where an error is above 1e-5 (loss) or 1e-4 (gradient), or where one of four
ranks that shard their weights holds over 5 % more than its share.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / p) for p in ("tests", "tests/distributed", "kernels/tests")]

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
from support.launching import Launcher  # noqa: E402
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
)
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 0.2)}
"""By precision, largest error of the first loss and of a gradient."""
KEY = ("stack", "ranks", "accumulation", "precision")
MEGATRON_KEY = ("stack", "library_version")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the stacks whose name holds this")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--megatron", type=Path)
    args = parser.parse_args()
    rows = list(csv.DictReader(OUT.open(newline=""))) if OUT.exists() else []
    known = {tuple(row[name] for name in KEY) for row in rows}
    chosen = [
        (run, precision)
        for run in RUNS
        for precision in precisions(run)
        if args.only in run.stack
        and (run.stack, str(run.ranks), str(run.accumulation), precision) not in known
    ]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder)
        for name, how in (("full", {}), ("lora", {"lora": True}), ("packed", {"repeats": True})):
            write_expected(folder, expected(folder, **how), name)
        launch = Launcher(folder)
        for run, precision in tqdm(chosen, "stacks"):
            errors, facts = one(launch, run, precision, folder)
            rows.append(row_of(run, precision, errors, facts))
            print(*rows[-1].values(), sep=",", flush=True)
            write(rows)
        for row in megatron_rows(launch, folder, args.megatron) if args.only in "megatron" else ():
            old = [
                r for r in rows if [r[k] for k in MEGATRON_KEY] != [row[k] for k in MEGATRON_KEY]
            ]
            rows = [*old, row]
            print(*row.values(), sep=",", flush=True)
            write(rows)
    bad = [row for row in rows if not is_within(row)]
    for row in bad:
        print("above the limits:", *row.values())
    return int(args.check and bool(bad))


def write(rows: list[dict]) -> None:
    """Writes the table."""
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def megatron_rows(launch: Launcher, folder: Path, newest: Path | None) -> Iterator[dict]:
    """The rows of every layout, measured now, of the installed version and of an unpacked one."""
    worker = WORKER.with_name("megatron_worker.py")
    runs = [(name, *run, ()) for name, run in LAYOUTS.items()] + [("ep2", 2, (), EXPERTS)]
    for home in [None, *([] if newest is None else [newest])]:
        environment = {} if home is None else {"MEGATRON_CORE": str(home)}
        for name, ranks, options, model in tqdm(runs, "megatron"):
            models, out = folder / f"megatron{len(model)}", folder / "megatron-out"
            if not models.is_dir():
                models.mkdir()
                launch(worker, "oracle", models, "--steps", STEPS, *model)
            how = [models, out, "--steps", STEPS, *options, *model]
            result = launch(worker, name, *how, ranks=ranks, env=environment)
            if result.status:
                raise SystemExit(f"megatron-{name}: {result.output[-3000:]}")
            errors = errors_of(out, ranks, models, "mixed", normaliser(options))
            if errors.missing:
                raise SystemExit(f"megatron-{name}: gradients of {errors.missing} are missing")
            known = facts_of(out, ranks - 1)
            policy, reference = known["bytes"]
            run = StackRun(
                f"megatron-{name.removeprefix('pp2-') if 'vpp' in name else name}",
                *(ranks, 8 // (2 if "dp2" in name or "ep2" in name else 1), "megatron-core"),
                "same layout",
            )
            facts = {"parameter_bytes": [policy + reference, 2 * policy * ranks]}
            version = f"megatron-core {known['version']}"
            yield row_of(run, "fp32", errors, facts) | {"library_version": version}


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
    """bf16 too in one run of some: autocast in Trainers, bf16 weights in our own engines."""
    in_bf16 = run.stack in ("trainer-ddp", "sfttrainer", "fsdp2", "deepspeed-zero-3")
    return ["fp32", "bf16"] if in_bf16 and run.accumulation == 1 and run.ranks < 3 else ["fp32"]


def one(launch: Launcher, run: StackRun, precision: str, folder: Path) -> tuple[Errors, dict]:
    """Errors and facts of one run."""
    out = folder / "out.safetensors"
    how = ["--accumulation", str(run.accumulation), "--precision", precision]
    result = launch(WORKER, run.stack, folder, out, *how, ranks=run.ranks)
    if result.status:
        raise SystemExit(f"{run}: {result.output[-3000:]}")
    errors = compared(out, folder / f"{run.oracle}.safetensors")
    if errors.missing:
        raise SystemExit(f"{run}: gradients of {sorted(errors.missing)[:3]} are missing")
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
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
