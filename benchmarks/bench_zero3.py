"""One ZeRO-3 step of policy and reference against the same step of the single-process engine.

    python benchmarks/bench_zero3.py --device cuda|cpu --out FILE.csv

DeepSpeed is started by torchrun with one rank (NCCL on CUDA, gloo on a CPU), see `zero3_worker`. A
row for each case says how far the two engines are apart, or why it could not run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import provenance
from result_rows import Rows, read_rows

from safereg_dist.parallel.launchers import free_port

CASES = (("fp32", "none"), ("bf16", "none"), ("bf16", "cpu"))
"""Precision, and where the reference's shards rest."""
_TIMEOUT_S = {"cuda": 65, "cpu": 200}


def rows_of(device: str, out: Path) -> Rows:
    """Where both processes put their rows."""
    return Rows(out, **provenance(torch.device(device)), stage="zero3")


def case_columns(precision: str, offload: str) -> dict[str, Any]:
    """What identifies a case in the table."""
    return {
        "what": f"ZeRO-3 step, reference on {'the device' if offload == 'none' else offload}",
        "implementation": f"DeepSpeed {precision}, 1 rank",
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[precision],
    }


class Ended(NamedTuple):
    """How the rank ended."""

    code: int
    last_words: str


def launch(folder: Path, device: str, out: Path) -> Ended:
    """Runs the rank under torchrun; what it prints goes to the screen."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--nnodes=1"),
        *("--local-addr=127.0.0.1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"),
        *(str(Path(__file__).with_name("zero3_worker.py")), device, str(out), str(folder)),
    ]
    # Loopback is all that one rank needs, and all that a machine without a network has.
    local = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**local, **os.environ, "DS_SKIP_CUDA_CHECK": "1"}
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    rank = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = rank.communicate(timeout=_TIMEOUT_S[device])[1]
    except subprocess.TimeoutExpired:
        rank.terminate()  # which torchrun hands on to the rank
        said = rank.communicate(timeout=8)[1]
        return Ended(124, f"not done after {_TIMEOUT_S[device]} s; {_reason(said)}")
    sys.stderr.write(said)
    return Ended(rank.returncode, _reason(said))


def _reason(text: str) -> str:
    """The last error in what a process said: torchrun adds a report of its own after it."""
    errors = [line.strip() for line in text.splitlines() if _is_error(line)]
    return errors[-1][-200:] if errors else text.strip()[-200:]


def _is_error(line: str) -> bool:
    words = line.split("]: ")[-1].split(":")[0].split()
    if len(words) != 1 or words[0].startswith("torch.distributed.elastic"):
        return False
    return words[0].endswith(("Error", "Exception", "Unavailable"))


def _missing(written: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    known = {(row["what"], row["dtype"]) for row in written}
    for case in CASES:
        columns = case_columns(*case)
        if (columns["what"], columns["dtype"]) not in known:
            yield case


def main() -> int:
    """Starts the rank, and adds a row for each case that it could not; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="CSV to which rows are added")
    arguments = parser.parse_args()
    rows = rows_of(arguments.device, arguments.out)
    before = len(read_rows(arguments.out))
    with tempfile.TemporaryDirectory() as folder:
        ended = launch(Path(folder), arguments.device, arguments.out)
    for case in _missing(read_rows(arguments.out)[before:]):
        rows.add(**case_columns(*case), status=f"could not run: {ended.last_words}")
    return ended.code


if __name__ == "__main__":
    sys.exit(main())
