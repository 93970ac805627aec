"""`safereg train`: fine-tunes as a configuration says, on the ranks of the launcher."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safereg_dist.commands.options import add_config

if TYPE_CHECKING:
    from safereg_dist.factory import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="everything but the training")


def run(arguments: argparse.Namespace) -> int:
    """Trains; the exit status."""
    return train_as(arguments.config, arguments.overrides, dry_run=arguments.dry_run)


def train_as(path: str | Path, overrides: Sequence[str], *, dry_run: bool = False) -> int:
    """Trains as the file at `path` says; the exit status.

    Args:
        dry_run: everything is loaded and checked, but no step is made and nothing is written.
    Raises:
        SafeRegError: on all ranks, where something is wrong.
    """
    from safereg_dist.config import load_config
    from safereg_dist.experiments.lisa import in_turns
    from safereg_dist.factory import build_run, start_backend
    from safereg_dist.parallel.distributed import leave_group, share_cores
    from safereg_dist.run.checkpoint import began_with
    from safereg_dist.run.folder import is_complete
    from safereg_dist.run.gate import refuse_too_many_held_back
    from safereg_dist.trainer import train

    share_cores()
    config = load_config(path, list(overrides))
    backend = start_backend(config)
    ranks = backend.ranks
    try:
        if is_complete(config, ranks) and not dry_run:
            if ranks.is_main:
                print(f"{config.output_dir} is already complete: nothing to do")
            return 0
        began = None if dry_run else began_with(Path(config.output_dir, "checkpoint"), ranks)
        built = in_turns(build_run(config, backend, began_with=began))
        if ranks.is_main:
            _announce(built)
        if dry_run:
            refuse_too_many_held_back(built)
            return 0
        status = train(built)
        if ranks.is_main and status == 0:
            from safereg_dist.evaluate.report import write_report

            print(f"report: {write_report([Path(config.output_dir)])}")
        return status
    finally:
        leave_group()


def _announce(run: "Run") -> None:
    from safereg_dist.run.folder import describe_run

    facts = describe_run(run)
    rows = ", ".join(
        f"{name} {c['kept']} rows ({c['overlong']} overlong, {c['dropped']} dropped)"
        for name, c in facts["rows"].items()
    )
    print(
        f"{facts['engine']} on {facts['world_size']} ranks: {facts['total_steps']} steps of "
        f"{facts['rows_per_step']} rows; {rows}; risk from {run.regularizer.risk.name}, threshold "
        f"{facts['threshold']:.3g}",
        flush=True,
    )
