"""LoRA under ZeRO-3, the policy with its adapters off as the reference: are traces and losses kept?

    python benchmarks/bench_lora_zero3.py [--steps 200] [--out benchmarks/results/lora_zero3.csv]

Two gloo ranks (see `lora_zero3_worker`). A row for each case: how often ZeRO-3 gave up the order of
modules along which it prefetches, parameters left gathered between steps, and how far the loss of
any step is from that of one process. `shared` is what happens without a trace of its own for the
pass with adapters off.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import provenance

RANKS = 2
CASES = (("own", False), ("own", True), ("shared", False))
"""The trace of the pass with adapters off, and activation checkpointing."""
_RESULTS = Path(__file__).parent / "results" / "lora_zero3.csv"
_WORKER = Path(__file__).with_name("lora_zero3_worker.py")
_PROVENANCE = ("date", "hardware", "commit", "torch")


def measured(steps: int) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    for trace, checkpointing in CASES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "found.json")
            options = ["--checkpointing"] * checkpointing + ["--shared"] * (trace == "shared")
            command = [
                *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"),
                *("--standalone", str(_WORKER), str(steps), str(out), *options),
            ]
            subprocess.run(command, check=True)
            found = json.loads(out.read_text("utf-8"))
        yield {
            "steps": steps,
            "ranks": RANKS,
            "trace": trace,
            "activation_checkpointing": checkpointing,
            **{name: f"{value:.7g}" for name, value in found.items()},
        }


def main() -> None:
    """Measures all cases and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=_RESULTS)
    arguments = parser.parse_args()
    known = provenance(torch.device("cpu"))
    common = {name: known[name] for name in _PROVENANCE}
    rows = [{**common, **row} for row in measured(arguments.steps)]
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
