"""The gate before any timing: kernels at production shapes against float64, on the device itself.

    python kernels/tests/gate.py [--device cuda|cpu] [--quick]        exit status 1 on a failure

On the CPU the kernels are interpreted, at small shapes.
Rows are of four kinds in turn: CE and KL, CE only, KL only, neither. Every row has one token that
has most of its model's mass, and what must not be read is NaN. Errors are norms, |got - want| /
|want|, of each kind of rows apart, and in raw logits of four sets of columns apart: the label, the
tokens with most of the mass, the last columns, the rest. So no part hides behind a larger one. Rows
of weight 0 must be exactly 0, and so must padding. Tolerances are derived in gate_measures.py.
"""

import argparse
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated

from gate_cases import production_cases, small_cases
from gate_checks import check
from gate_inputs import Case
from gate_measures import worst

COMPILERS = 8
"""Processes that compile, each with a CUDA context of half a gigabyte."""
COMPILE_TIMEOUT_S = 45


def compile_ahead(cases: list[Case]) -> None:
    """Compiles what the cases launch, in processes that meet in Triton's cache on the disk.

    One after the other that is most of the gate's time. Whatever goes wrong here goes wrong again,
    and is told, where the case is run.
    """
    pool = multiprocessing.get_context("spawn").Pool(min(COMPILERS, os.cpu_count() or 1))
    with pool, suppress(multiprocessing.TimeoutError):
        pool.map_async(_compile, cases, chunksize=1).get(COMPILE_TIMEOUT_S)


def _compile(case: Case) -> None:
    """The same kernels, on rows of each kind."""
    with suppress(Exception):
        check(replace(case, rows=40), torch.device("cuda"))


def run(cases: list[Case], device: torch.device) -> int:
    """Prints one line per case; the number of cases that fail."""
    failures, start = 0, time.perf_counter()
    for case in cases:
        began = time.perf_counter()
        try:
            measure = worst(check(case, device))
        except Exception as error:  # the other cases still tell something
            print(f"FAILED    {case.name}: {type(error).__name__}: {error}", flush=True)
            failures += 1
            continue
        seconds = time.perf_counter() - began
        failures += measure.ratio > 1
        verdict = "FAILED" if measure.ratio > 1 else "holds "
        print(
            f"{verdict} {measure.ratio:8.3f} of what is allowed  {seconds:5.1f} s  "
            f"{case.name}: {measure.what}",
            flush=True,
        )
    total = time.perf_counter() - start
    print(f"gate: {len(cases) - failures} of {len(cases)} cases hold, {total:.1f} s")
    return failures


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    arguments = parser.parse_args()
    is_cuda = arguments.device == "cuda"
    if is_cuda and not torch.cuda.is_available():
        print("gate: no CUDA device; --device cpu interprets the kernels at small shapes")
        return 1
    cases = production_cases() if is_cuda else small_cases()
    cases = cases[::3] if arguments.quick else cases
    if is_cuda:
        compile_ahead(cases)
    else:
        from safereg_kernels import fused

        os.environ["SAFEREG_KERNELS"] = "triton"
        fused.BLOCK_COLUMNS = 256  # a small row has a whole block and a partial one
    return 1 if run(cases, torch.device(arguments.device)) else 0


if __name__ == "__main__":
    sys.exit(main())
