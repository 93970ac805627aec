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
    parser.add_argument(
        "--key",
        metavar="VARIABLE|FILE",
        help="check the runs' signatures with the secret in this variable (SAFEREG_...), or with "
        "the private key of this public one (PEM)",
    )
    parser.add_argument(
        "--model-card",
        type=Path,
        metavar="FILE",
        help="also write a section on safety into this model card (Markdown)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the report, and the model card's section where it is asked for; 0."""
    from safereg_dist.errors import printable
    from safereg_dist.evaluate.report import write_model_card, write_report
    from safereg_dist.run.signing import checking_key

    key = None if arguments.key is None else checking_key(arguments.key)
    print(f"report: {printable(write_report(arguments.runs, out=arguments.out, key=key))}")
    if arguments.model_card is not None:
        name = write_model_card(arguments.runs, arguments.model_card, key=key)
        print(f"model card of {printable(name)}: {printable(arguments.model_card)}")
    return 0
