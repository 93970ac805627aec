"""What the safety path costs over plain fine-tuning: FLOPs, bytes, seconds and memory.

    python benchmarks/bench_overhead.py [--work runs/overhead] [--out FOLDER] [--quick]

Writes `overhead.csv` and figures (`plot_overhead`), prints a table and the claims
(`overhead_claims`), and ends with status 1 where a claim does not hold. Started again, it goes on
after the last case measured on the same commit. What is claimed, and how it is counted:

- Real processes under the deepspeed launcher (ZeRO-3, gloo), 2 and 4 ranks, float32; the demo's
  model and a wider one in which matrix products dominate (`overhead_cases`). The arms of a case
  live in one process group and take turns (`overhead_worker`).
- `sft` is our own plain fine-tuning: the fused head on response tokens alone. `routed` sends rows
  with b > 0 through the reference. `routed_first_epoch` has to run the reference's first half over
  every prompt, to learn the risk. `stored` reads the reference's states from disk. `always_on` is
  the usual way (`always_on`): the whole reference for every row, and all logits of both.
- FLOPs and bytes come from `safereg_dist.profiling.Recorder`, exactly, summed over ranks;
  `safety_bytes_per_micro_batch` is the safety path's payload on the rank that has most.
- A time ratio is the median over rounds of time(arm) / time(sft) of the same round, with the 20 %
  and 80 % quantiles beside it. In the row of `sft` it is a second engine that does the same: what
  it is off from 1 is noise, not cost.
- Peak memory on a CPU is bytes of tensors: what engines hold between steps, and the allocator's
  highest sum in one step beyond that (lowest of three steps); of the rank that has most.
- Rows with device `meta` are FLOPs of one row of real size, products alone (`real_shapes`).
- `loss` is that of the first measured step: arms with a reference must agree on it.

What was not measured is an empty cell.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from harness import commit, installed, provenance, write_csv
from overhead_cases import (
    FRACTIONS,
    LARGE_FRACTION,
    LARGE_MICRO_BATCH_SIZE,
    LARGE_STEP,
    MODELS,
    store_reference,
    write_case,
)
from overhead_claims import claims_of, notes_of
from overhead_rows import COLUMNS, Launch, Row, meta_rows, print_table, read_table, rows_of
from overhead_worker import Case
from plot_overhead import draw_all
from tqdm import tqdm

from safereg_dist.parallel.launchers import free_port

WORKER = Path(__file__).resolve().with_name("overhead_worker.py")
RESULTS = Path(__file__).resolve().parent / "results"
RANKS = (2, 4)
ROUNDS, ROUNDS_AT_ZERO = 5, 9
"""More rounds where a ratio of 1 is claimed."""
SHORT = ("wide", 4)
SHORT_ROUNDS = {0.0: 5, 0.1: 3, 1.0: 3}
"""The largest launch is timed at these fractions only: two cores would take twenty minutes."""
MEMORY_FRACTIONS, MEMORY_STEPS = (0.1, 1.0), 3
ARMS = ("sft", "sft again", "routed", "routed_first_epoch", "stored", "always_on")
ARMS_AT_ZERO = (*ARMS, "routed:probe-policy", "routed:probe-reference")
"""At 0 % all sources of risk are compared."""
LARGE_ARMS = ("sft", "routed", "stored", "always_on")
QUICK_ARMS = ("sft", "routed", "stored", "always_on")
STEP_ERRORS = 40
"""Last lines of a launch's log that are shown where it fails."""


# ---- what is measured


def all_launches(counts: Sequence[int]) -> list[Launch]:
    """The whole grid, on so many ranks."""
    return [
        Launch(model=model, ranks=ranks, cases=tuple(_cases(model, ranks)))
        for ranks in counts
        for model in MODELS
    ]


def quick_launches() -> list[Launch]:
    """One fraction of one model on two ranks, in which little is timed."""
    case = _case("demo", 2, 0.1, arms=QUICK_ARMS, rounds=1, memory_steps=1)
    return [Launch(model="demo", ranks=2, cases=(case,))]


def _cases(model: str, ranks: int) -> Iterator[Case]:
    is_short = (model, ranks) == SHORT
    for fraction in FRACTIONS:
        rounds = ROUNDS_AT_ZERO if fraction == 0 else ROUNDS
        yield _case(
            *(model, ranks, fraction),
            arms=ARMS_AT_ZERO if fraction == 0 else ARMS,
            rounds=SHORT_ROUNDS.get(fraction, 0) if is_short else rounds,
            memory_steps=MEMORY_STEPS if fraction in MEMORY_FRACTIONS else 0,
        )
    if not is_short:
        yield _large_case()


def _case(
    model: str,
    ranks: int,
    fraction: float,
    *,
    arms: tuple[str, ...],
    rounds: int,
    memory_steps: int,
) -> Case:
    step = MODELS[model]
    return Case(
        name=f"{fraction:.2f}",
        fraction=fraction,
        num_rows=step.rows_per_step,
        num_risky=round(fraction * step.rows_per_step),
        micro_batch_size=step.rows_per_step // (step.grad_accum_steps * ranks),
        rounds=rounds,
        memory_steps=memory_steps,
        arms=arms,
    )


def _large_case() -> Case:
    return Case(
        name="large",
        fraction=LARGE_FRACTION,
        num_rows=LARGE_STEP,
        num_risky=-int(-LARGE_FRACTION * LARGE_STEP // 1),  # rounded up
        micro_batch_size=LARGE_MICRO_BATCH_SIZE,
        rounds=0,
        memory_steps=0,
        arms=LARGE_ARMS,
    )


def measure(launch: Launch, work: Path, bar: tqdm) -> None:
    """Measures the cases that are not there yet, in one launch.

    Raises:
        SystemExit: the launch failed; its last lines are shown.
    """
    missing = [case for case in launch.cases if not _is_measured(launch.result(case, work))]
    bar.update(len(launch.cases) - len(missing))
    if not missing:
        return
    folder = work / launch.model
    _prepare(folder, launch.model, is_stored=any("stored" in case.arms for case in missing))
    cases = [{**asdict(case), "out": str(launch.result(case, work))} for case in missing]
    settings = {"model": launch.model, "folder": str(folder), "cases": cases}
    settings_file = work / f"{launch.name}.json"
    settings_file.write_text(json.dumps(settings), encoding="utf-8")
    _run_ranks(launch, settings_file, [Path(case["out"]) for case in cases], bar)


def _prepare(folder: Path, model: str, *, is_stored: bool) -> None:
    """Models and rows of this commit."""
    made_by = folder / "commit"
    if not made_by.is_file() or made_by.read_text("utf-8") != commit():
        shutil.rmtree(folder, ignore_errors=True)
        write_case(folder, model)
        made_by.write_text(commit(), encoding="utf-8")
    if is_stored and not (folder / "store").is_dir():
        store_reference(folder, model)


def _is_measured(path: Path) -> bool:
    """Whether the figures are there, and of this commit."""
    return path.is_file() and json.loads(path.read_text("utf-8"))["commit"] == commit()


def _run_ranks(launch: Launch, settings: Path, results: list[Path], bar: tqdm) -> None:
    for path in results:
        path.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(launch.ranks)),
        *("--master_port", str(free_port()), str(WORKER), str(settings)),
    ]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "DS_LOG_LEVEL": "error"}
    log, done = settings.with_suffix(".log"), 0
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        while process.poll() is None or done < sum(path.is_file() for path in results):
            now = sum(path.is_file() for path in results)
            if now > done:
                bar.update(now - done)
                done = now
            time.sleep(0.2)
    if process.returncode != 0 or done < len(results):
        last = log.read_text("utf-8", errors="replace").splitlines()[-STEP_ERRORS:]
        raise SystemExit("\n".join([*last, f"{launch.name} failed, see {log}"]))


# ---- the whole


def check(rows: Sequence[Row], *, is_whole: bool) -> bool:
    """Prints claims and notes; whether all claims hold (in a whole run: and were measured)."""
    claims = claims_of(rows)
    for claim in claims:
        verdict = {True: "ok  ", False: "FAIL", None: "----"}[claim.holds]
        print(f"{verdict}  {claim.text}: {claim.measured}")
    for note in notes_of(rows):
        print(f"      {note}")
    return all(claim.holds or (claim.holds is None and not is_whole) for claim in claims)


def main() -> int:
    """Measures, writes, draws and checks; the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/overhead"), help="kept between runs"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="on CUDA a GPU each")
    parser.add_argument("--quick", action="store_true", help="one case, to see that it works")
    parser.add_argument("--check", action="store_true", help="only check the CSV that is there")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out == RESULTS:
        arguments.out = arguments.work  # a trial must not replace the table that was measured
    table = arguments.out / "overhead.csv"
    if not arguments.check:
        arguments.work.mkdir(parents=True, exist_ok=True)
        launches = quick_launches() if arguments.quick else all_launches(arguments.ranks)
        rows = measure_all(launches, arguments.work.resolve())
        if not arguments.quick:
            rows += meta_rows()
        write_csv([{**same_for_all(), **row} for row in rows], table, COLUMNS)
        if not arguments.quick:
            draw_all(table, arguments.out / "overhead")
    if not table.is_file():
        raise SystemExit(f"{table} is not there: run without --check first")
    rows = read_table(table)
    print_table(rows)
    return 0 if check(rows, is_whole=not arguments.quick) else 1


def measure_all(launches: Sequence[Launch], work: Path) -> list[Row]:
    """Rows of all launches, those that are missing measured first."""
    with tqdm(total=sum(len(x.cases) for x in launches), unit=" cases", desc="steps") as bar:
        for launch in launches:
            measure(launch, work, bar)
    return [row for launch in launches for row in rows_of(launch, work)]


def same_for_all() -> Row:
    """Date, versions and the machine, for rows that do not have their own."""
    versions = {name: installed(name) for name in ("transformers", "deepspeed")}
    found = {**provenance(torch.device("cpu")), **versions}
    return {name: value for name, value in found.items() if name in COLUMNS}


if __name__ == "__main__":
    sys.exit(main())
