"""`safereg sweep`: arms on axes (seeds, data sets, settings), in one resumable table."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("sweep", type=Path, help="YAML that names config, axes, arms, evaluation")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")


def run(arguments: argparse.Namespace) -> int:
    """Runs what is not done yet; 1 where a cell failed."""
    from safereg_dist.commands.train import train_as
    from safereg_dist.errors import printable
    from safereg_dist.experiments.sweep import cells_of, read_sweep, run_sweep

    sweep = read_sweep(arguments.sweep)
    if arguments.list:
        for cell in cells_of(sweep):
            print(printable(cell.name))
        return 0
    return int(run_sweep(sweep, train_as) > 0)
