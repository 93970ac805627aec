"""`safereg train`: fine-tunes as a configuration says, on the ranks of the launcher."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safereg_dist.commands.options import add_config, example
from safereg_dist.commands.outcome import Outcome, command, training_verb
from safereg_dist.errors import EXIT_DONE, EXIT_REQUEUE, printable
from safereg_dist.parallel.lost_peer import naming_lost_peers
from safereg_dist.screen.progress import say

if TYPE_CHECKING:
    from safereg_dist.config import Config
    from safereg_dist.factory import Run
    from safereg_dist.parallel.engine import Backend
    from safereg_dist.run.resume import Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example("safereg train run.yaml train.epochs=2 optimizer.lr=2e-5")
    add_config(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="load and check everything, train and write nothing"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Trains."""
    config, overrides = arguments.config, arguments.overrides
    status = train_as(config, overrides, dry_run=arguments.dry_run)
    if status != EXIT_DONE or os.environ.get("RANK", "0") != "0":
        return Outcome(status=status)
    from safereg_dist.config import load_config

    loaded = load_config(config, list(overrides))
    if arguments.dry_run:
        return Outcome(now=command(training_verb(loaded.engine.name), config, *overrides))
    folder = Path(loaded.output_dir)
    given = ("--model", folder / "model", "--prompts", "HELD_OUT.jsonl")
    return Outcome(now=command("eval", *given, "--out", folder / "eval.json"))


@naming_lost_peers()
def train_as(path: str | Path, overrides: Sequence[str], *, dry_run: bool = False) -> int:
    """Trains as the file at `path` says; the exit status.

    Args:
        dry_run: everything is loaded and checked, but no step is made and nothing is written.
    Raises:
        SafeRegError: on all ranks, where something is wrong.
    """
    from safereg_dist.config import load_config

    config = load_config(path, list(overrides))
    say("train: loads the libraries")
    from safereg_dist.factory import start_backend
    from safereg_dist.parallel.distributed import leave_group, share_cores
    from safereg_dist.run.folder import claimed
    from safereg_dist.run.gate import refuse_too_many_held_back
    from safereg_dist.run.rank_log import rank_log
    from safereg_dist.run.resume import find_checkpoint
    from safereg_dist.run.stop import forget_stop
    from safereg_dist.run.trackers import require_trackers
    from safereg_dist.run.watching import how_it_goes_on
    from safereg_dist.storage.signing import signing_key
    from safereg_dist.trainer import train

    share_cores()
    backend = start_backend(config)
    ranks = backend.ranks
    try:
        with ranks.together():
            if ranks.is_main:
                require_trackers(config.tracking)
                signing_key(config.signing)  # one that is missing is refused before the rows
        with claimed(config, ranks, writes=not dry_run) as is_done:
            if is_done and not dry_run:
                if ranks.is_main:
                    print(f"{config.output_dir} is already complete: nothing to do")
                return 0
            if dry_run:
                refuse_too_many_held_back(_announced(config, backend))
                return 0
            folder = Path(config.output_dir)
            if ranks.is_main:
                forget_stop(folder)  # it was meant for the run before
            with rank_log(folder, rank=ranks.rank, world_size=ranks.world_size) as log:
                found = find_checkpoint(config, ranks)
                status = train(_announced(config, backend, found), found)
                log(f"ended with status {status}")
            if ranks.is_main and status == 0:
                from safereg_dist.evaluate.report import write_report

                print(f"model: {printable(folder / 'model')}")
                print(f"report: {printable(write_report([folder]))}")
            if ranks.is_main and status == EXIT_REQUEUE:
                print(f"{folder} has saved and ended on request; {how_it_goes_on(folder)}")
            return status
    finally:
        leave_group()


def _announced(config: "Config", backend: "Backend", found: "Found | None" = None) -> "Run":
    """The run, built and described on the screen."""
    from safereg_dist.experiments.lisa import in_turns
    from safereg_dist.factory import build_run
    from safereg_dist.run.folder import describe_run

    began_with = None if found is None else found.began_with
    say("train: reads the rows and the model")
    run = in_turns(build_run(config, backend, began_with=began_with))
    if not run.ranks.is_main:
        return run
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
    return run
