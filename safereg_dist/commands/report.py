"""`safereg report`: HTML and figures of one or several runs."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="a run, the folder of an evaluation, or one with a table of disguises",
    )
    parser.add_argument("--out", type=Path, help="folder of the report; default: the first run")


def run(arguments: argparse.Namespace) -> int:
    """Writes the report; 0."""
    from safereg_dist.errors import printable
    from safereg_dist.evaluate.report import write_report

    print(f"report: {printable(write_report(arguments.runs, out=arguments.out))}")
    return 0
