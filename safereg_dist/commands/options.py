"""Pieces that several verbs' options share."""

import argparse
from collections.abc import Callable
from pathlib import Path


def at_least(low: int) -> Callable[[str], int]:
    """The type of an integer option that must not be below `low`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    parse.__name__ = "int"  # argparse's name of the type in its message
    return parse


def add_config(parser: argparse.ArgumentParser) -> None:
    """A configuration file and `key=value` overrides."""
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100")
    add_local_rank(parser)


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """What older launchers append to the command; it is read from the environment."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
