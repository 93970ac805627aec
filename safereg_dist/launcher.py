"""Verbs that run on one or many ranks: what a process does between its start and its exit."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from safereg_dist.config import load_config
from safereg_dist.factory import build_run, start_backend
from safereg_dist.train import describe_run, is_complete, train


def run_training(config_file: Path, overrides: Sequence[str], *, dry_run: bool) -> int:
    """Trains as the configuration says, on the ranks of the launcher; the exit status.

    With `dry_run` everything is loaded and checked, but no step is made and nothing is written.
    """
    _share_cores()
    config = load_config(config_file, overrides)
    backend = start_backend(config)
    ranks = backend.ranks
    try:
        if is_complete(config, ranks) and not dry_run:
            if ranks.is_main:
                print(f"{config.output_dir} is already complete: nothing to do")
            return 0
        run = build_run(config, backend)
        if ranks.is_main:
            _print_plan(run)
        if dry_run:
            return 0
        status = train(run)
        if ranks.is_main and status == 0:
            from safereg_dist.evaluate.report import write_report

            print(f"report: {write_report([Path(config.output_dir)])}")
        return status
    finally:
        _leave_group()


def run_anchor_build(
    model: Path, prompts: Sequence[Path], out: Path, *, max_new_tokens: int, batch_size: int
) -> int:
    """Greedy answers of the reference, sharded over the ranks of the launcher; the exit status."""
    from safereg_dist.anchor import build_anchors, merge_anchor_parts

    _share_cores()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world_size > 1:
        from safereg_dist.config import EngineConfig
        from safereg_dist.parallel.deepspeed import start_ranks

        ranks = start_ranks(EngineConfig())
    else:
        from safereg_dist.parallel.single import single_ranks

        ranks = single_ranks()
    try:
        with ranks.together():
            build_anchors(
                model,
                list(prompts),
                out,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                progress=rank == 0,
                device=ranks.device,
            )
        with ranks.together():
            if world_size > 1 and ranks.is_main:
                merge_anchor_parts(out, world_size)
    finally:
        _leave_group()
    return 0


def _print_plan(run) -> None:
    facts = describe_run(run)
    rows = ", ".join(
        f"{name} {c['kept']} rows ({c['overlong']} overlong, {c['dropped']} dropped)"
        for name, c in facts["rows"].items()
    )
    print(
        f"{facts['engine']} on {facts['world_size']} ranks: {facts['total_steps']} steps of "
        f"{facts['rows_per_step']} rows; {rows}; risk from {run.step.risk.name}, threshold "
        f"{facts['threshold']:.3g}",
        flush=True,
    )


def _share_cores() -> None:
    """Ranks of one node share its cores, unless the user has decided; CPU training only."""
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, local)))


def _leave_group() -> None:
    # Only NCCL wants its communicators taken down in order. Gloo's end with the process: taking
    # them down races with their threads (see `cli.entry`).
    is_started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_started and torch.distributed.get_backend() == "nccl":
        with suppress(RuntimeError):  # a peer may be gone already
            torch.distributed.destroy_process_group()
