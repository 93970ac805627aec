"""`safereg ledger verify`: recomputes the chain of hashes of a run's ledger."""

import argparse
from pathlib import Path

from safereg_dist.commands.options import add_action, add_json, example
from safereg_dist.commands.outcome import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its actions and their options."""
    shows = "safereg ledger verify runs/my-run"
    parser.epilog = example(shows)
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    verify = add_action(
        actions,
        "verify",
        "recompute the chain of hashes and hold it against summary.json",
        shows=shows,
    )
    verify.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="output_dir of the run")
    verify.add_argument(
        "--key",
        metavar="VARIABLE|FILE",
        help="the summary must be signed with the secret in this variable (SAFEREG_...), or with "
        "the private key of this public one (PEM)",
    )
    add_json(verify)


def run(arguments: argparse.Namespace) -> Outcome:
    """Verifies, or raises."""
    from safereg_dist.run.ledger import verify_ledger
    from safereg_dist.storage.signing import checking_key

    key = None if arguments.key is None else checking_key(arguments.key)
    head = verify_ledger(arguments.run_dir, key)
    signed = "" if key is None else f", signed: {key.name}"
    print(f"ledger holds: {head.rows} rows, head {head.head}{signed}")
    for step, before, now in head.rank_changes:
        print(f"  from step {step} on {now} ranks, before on {before}")
    figures = {
        "rows": head.rows,
        "head": head.head,
        "signed_with": None if key is None else key.name,
        "rank_changes": [change._asdict() for change in head.rank_changes],
    }
    return Outcome(figures=figures)
