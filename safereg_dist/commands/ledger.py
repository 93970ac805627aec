"""`safereg ledger verify`: recomputes the chain of hashes of a run's ledger."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its actions and their options."""
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    verify = actions.add_parser("verify", help="recompute the chain of hashes")
    verify.add_argument("run_dir", type=Path)
    verify.add_argument(
        "--key",
        metavar="VARIABLE|FILE",
        help="the summary must be signed with the secret in this variable (SAFEREG_...), or with "
        "the private key of this public one (PEM)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verifies; 0."""
    from safereg_dist.run.ledger import verify_ledger
    from safereg_dist.run.signing import checking_key

    key = None if arguments.key is None else checking_key(arguments.key)
    head = verify_ledger(arguments.run_dir, key)
    signed = "" if key is None else f", signed: {key.name}"
    print(f"ledger holds: {head.rows} rows, head {head.head}{signed}")
    for step, before, now in head.rank_changes:
        print(f"  from step {step} on {now} ranks, before on {before}")
    return 0
