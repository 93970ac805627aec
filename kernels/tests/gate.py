"""The gate before any timing: kernels at production shapes against float64, on the device itself.

    python kernels/tests/gate.py [--device cuda|cpu] [--quick]        exit status 1 on a failure

Rows are of four kinds in turn: CE and KL, CE only, KL only, neither. Every row has one token that
its model is nearly sure of, and what must not be read is NaN. Errors are norms, |got - want| /
|want|, of each kind of rows apart, and in raw logits of four sets of columns apart: the label, the
tokens that the models are sure of, the last columns, the rest. So no part hides behind a larger
one. Rows of weight 0 must be exactly 0, and so must padding.
Tolerances are derived in gate_measures.py.
"""

import argparse
import sys
import time

import torch
from gate_cases import production_cases, small_cases
from gate_checks import check
from gate_inputs import Case
from gate_measures import worst


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
    device = (
        torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    )
    cases = production_cases() if device.type == "cuda" else small_cases()
    if arguments.quick:
        cases = cases[::3]
    return 1 if run(cases, device) else 0


if __name__ == "__main__":
    sys.exit(main())
