"""`safereg report`: HTML and figures of one or several runs."""

import argparse
from pathlib import Path

from safereg_dist.commands.options import add_json, example
from safereg_dist.commands.outcome import Outcome, command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example("safereg report runs/base runs/my-run --out runs/report")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="a run, the folder of an evaluation, or one with a table of disguises; beside a "
        "single run stands the base that its evaluation was compared with",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="of the report (default: the run, or the folder that holds the first of several)",
    )
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
        help="also write a section on safety into this model card (Markdown), of the run whose "
        "folder it lies in",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Writes the report, and the model card's section where it is asked for."""
    from safereg_dist.errors import printable
    from safereg_dist.evaluate.report import write_model_card, write_report
    from safereg_dist.storage.signing import checking_key

    key = None if arguments.key is None else checking_key(arguments.key)
    runs, out = arguments.runs, arguments.out
    if len(runs) == 1 and (base := _base_of(runs[0])) is not None:
        runs, out = [base, *runs], out or runs[0]
    page = write_report(runs, out=out, key=key)
    print(f"report: {printable(page)}")
    if arguments.model_card is not None:
        name = write_model_card(runs, arguments.model_card, key=key)
        print(f"model card of {printable(name)}: {printable(arguments.model_card)}")
    logged = next((run for run in runs if (run / "summary.json").is_file()), None)
    return Outcome(
        figures={"report": page, "runs": runs},
        now="" if logged is None else command("ledger", "verify", logged),
    )


def _base_of(run: Path) -> Path | None:
    """The folder of the base that the run's evaluation was compared with, where it is beside it."""
    from safereg_dist.evaluate.compare import base_beside
    from safereg_dist.storage.json_text import json_object

    known = base_beside(run / "eval.json")
    if known is None or not (run / "eval.json").is_file():
        return None
    evaluation = json_object((run / "eval.json").read_bytes()) or {}
    return known.parent if evaluation.get("base") == known.parent.name else None
