"""`safereg sweep`: arms on axes (seeds, data sets, settings), in one resumable table."""

import argparse
from pathlib import Path

from safereg_dist.commands.options import add_json, add_quiet, example
from safereg_dist.commands.outcome import Outcome
from safereg_dist.errors import EXIT_DONE, EXIT_FAILED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example("safereg sweep sweep.yaml", "safereg sweep sweep.yaml --list")
    parser.add_argument(
        "sweep",
        type=Path,
        metavar="SWEEP.yaml",
        help="names config, out, axes, arms, evaluation; done cells are not run again",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    add_json(parser)
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Runs what is not done yet; fails where a cell did."""
    from safereg_dist.commands.train import train_as
    from safereg_dist.errors import printable
    from safereg_dist.experiments.sweep import cells_of, read_sweep, run_sweep

    sweep = read_sweep(arguments.sweep)
    if arguments.list:
        for cell in cells_of(sweep):
            print(printable(cell.name))
        return Outcome(figures={"cells": [cell.name for cell in cells_of(sweep)]})
    swept = run_sweep(sweep, train_as)
    return Outcome(
        status=EXIT_FAILED if swept.failed else EXIT_DONE,
        figures={"rows": swept.rows, "failed_cells": swept.failed},
    )
