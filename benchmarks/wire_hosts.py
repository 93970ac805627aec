"""Bytes that cross the network between two hosts in an optimizer step, against the plan.

    python benchmarks/wire_hosts.py [--out benchmarks/results/wire_hosts.csv]      as root, minutes

Two hosts of `tests/hosts.sh` train the wide model of `bench_overhead.py` with a rank each: plain
fine-tuning, the reference routed and stored on 0, 10 and 100 % of the rows, and always on. Measured
are the received bytes of each host's network card over `STEPS` steps, headers included. The plan
counts a reduce-scatter as S (g - 1) / g bytes, what NCCL moves; gloo moves more, which the first
rows measure by collective, and the planned gradients are scaled by it before the comparison.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import provenance
from overhead_cases import MODELS, PROMPT_TOKENS, RESPONSE_TOKENS, store_reference, write_case
from torch import distributed as dist

from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import read_shape
from safereg_dist.plan.traffic import traffic

TESTS = Path(__file__).resolve().parents[1] / "tests"
OUT = Path(__file__).resolve().parent / "results" / "wire_hosts.csv"
PROVENANCE = ("date", "hardware", "commit", "torch")
COLUMNS = (
    *("what", "risky_fraction", "received_bytes", "planned_bytes", "planned_on_gloo"),
    *("gap", "added_to_sft", "added_to_sft_planned", *PROVENANCE),
)
MODEL, HOSTS, STEPS = "wide", 2, 4
ARMS = (
    *(("sft", 0.0), ("routed", 0.0), ("routed", 0.1), ("routed", 1.0)),
    *(("stored", 0.0), ("stored", 0.1), ("stored", 1.0), ("always_on", 0.1)),
)
BUFFER = 4 << 20  # elements: 16 MiB, where headers weigh nothing
LIMIT = 0.02
"""The largest gap between wire and plan that passes."""


def main() -> int:
    """Measures, writes the table; 1 where the wire and the plan are further apart than `LIMIT`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        measure_as_rank(options.rank)
    with tempfile.TemporaryDirectory(prefix="wire-") as name:
        folder = Path(name)
        write_case(folder, MODEL)
        store_reference(folder, MODEL)
        run_ranks(folder)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(HOSTS)]
        rows = table(folder, {key: sum(r[key] for r in ranks) / HOSTS for key in ranks[0]})
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return int(any(abs(row.get("gap", 0.0)) > LIMIT for row in rows))


def run_ranks(folder: Path) -> None:
    """One rank on each of two hosts; raises where one fails."""
    sys.path.insert(0, str(TESTS))
    from support.hosts import Hosts

    hosts = Hosts(folder / "hosts", HOSTS)
    try:
        ranks = [
            subprocess.Popen(
                hosts.command(rank, sys.executable, __file__, "--rank", folder),
                env={
                    **os.environ,
                    **{"RANK": str(rank), "WORLD_SIZE": str(HOSTS), "LOCAL_RANK": "0"},
                    **{"LOCAL_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"},
                    **{"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"},
                },
            )
            for rank in range(HOSTS)
        ]
        assert not any([rank.wait() for rank in ranks]), "a rank failed, see above"
    finally:
        hosts.close()


def measure_as_rank(folder: Path) -> None:
    """Writes the bytes that this host received: of collectives, and a step of each arm."""
    from overhead_worker import Case, arm_config, build_arms

    from safereg_dist.factory import start_backend

    backend = start_backend(arm_config(folder, MODEL, "none", ranks=HOSTS))
    found = {name: _received(run) for name, run in collectives().items()}
    arms = build_arms(folder, MODEL, backend, dict.fromkeys(name for name, _ in ARMS))
    step = MODELS[MODEL]
    for name, fraction in ARMS:
        case = Case(
            name=name,
            fraction=fraction,
            num_rows=step.rows_per_step,
            num_risky=round(fraction * step.rows_per_step),
            micro_batch_size=step.rows_per_step // (step.grad_accum_steps * HOSTS),
            rounds=0,
            memory_steps=0,
            arms=(),
        )
        arm = arms[name].arm
        arm.begin(case)
        found[f"{name} {fraction}"] = _received(arm)
    (folder / f"{backend.ranks.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


def collectives() -> dict[str, Callable[[], Any]]:
    """Each collective of ZeRO-3 over a buffer of `BUFFER` float32."""
    whole, part = torch.ones(BUFFER), torch.ones(BUFFER // HOSTS)
    return {
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, part),
        "all_reduce": lambda: dist.all_reduce(whole),
    }


def ideal_bytes() -> dict[str, float]:
    """What each of `collectives` has to move to a rank."""
    moved = 4 * BUFFER * (HOSTS - 1) / HOSTS
    return {
        "reduce_scatter_tensor": moved,
        "all_gather_into_tensor": moved,
        "all_reduce": 2 * moved,
    }


def _received(run: Callable[[], Any]) -> float:
    """Bytes that this host's card received in one call, the mean over `STEPS` of them."""
    run()  # connections, ZeRO-3's trace and the optimizer's states are made in the first
    before = _quiet_counter()
    for _ in range(STEPS):
        run()
    return (_quiet_counter() - before) / STEPS


def _quiet_counter() -> int:
    """The counter of received bytes once all ranks are here and nothing is on its way."""
    dist.barrier()
    time.sleep(0.5)
    counter = int(Path("/sys/class/net/eth0/statistics/rx_bytes").read_text())
    dist.barrier()
    return counter


def table(folder: Path, received: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of the file, from the bytes of each measurement and the plan's."""
    facts = provenance(torch.device("cpu"))
    common = {name: facts[name] for name in PROVENANCE}
    rows = [
        {"what": name, "received_bytes": round(received[name]), "planned_bytes": round(ideal)}
        for name, ideal in ideal_bytes().items()
    ]
    gloo = received["reduce_scatter_tensor"] / ideal_bytes()["reduce_scatter_tensor"]
    shape, step = read_shape(folder / "policy"), MODELS[MODEL]
    sft = received["sft 0.0"]
    sft_planned = None
    for arm, fraction in ARMS:
        settings = Settings(
            world_size=HOSTS,
            gpus_per_node=1,
            seq_length=PROMPT_TOKENS + RESPONSE_TOKENS,
            micro_batch=step.rows_per_step // (step.grad_accum_steps * HOSTS),
            grad_accum=step.grad_accum_steps,
            risky_fraction=fraction,
            arm=arm,
            balance="deal",
            precision="fp32",
        )
        moved = {name: item.total for name, item in traffic(shape, settings).items()}
        planned = sum(moved.values())
        on_gloo = planned + moved["gradients"] * (gloo - 1)
        found = received[f"{arm} {fraction}"]
        sft_planned = planned if sft_planned is None else sft_planned
        rows.append(
            {
                "what": arm,
                "risky_fraction": fraction,
                "received_bytes": round(found),
                "planned_bytes": round(planned),
                "planned_on_gloo": round(on_gloo),
                "gap": round(found / on_gloo - 1, 4),
                "added_to_sft": round(found / sft - 1, 4),
                "added_to_sft_planned": round(planned / sft_planned - 1, 4),
            }
        )
    for row in rows:
        print(row, flush=True)
    return [{**row, **common} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
