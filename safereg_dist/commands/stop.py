"""`safereg stop`: asks a run to save a checkpoint after its step and to end."""

import argparse
import sys
from functools import partial
from pathlib import Path

from safereg_dist.commands.options import example
from safereg_dist.errors import EXIT_DONE, EXIT_REQUEUE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example("safereg stop runs/my-run --wait  # needs a run that trains")
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="output_dir of the run, seen from any host"
    )
    parser.add_argument("--wait", action="store_true", help="until it has saved and ended")
    parser.add_argument(
        *("--timeout", "-t"),
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="longest wait in seconds",
    )


def run(arguments: argparse.Namespace) -> int:
    """Asks, and waits if told to; the exit status."""
    from safereg_dist.run.stop import has_ended, request_stop, wait_for_stop
    from safereg_dist.run.watching import how_it_goes_on, state_of

    request_stop(arguments.run_dir)
    if not arguments.wait:
        print(
            f"asked: {arguments.run_dir} saves after its step, and its ranks end with status "
            f"{EXIT_REQUEUE}"
        )
        return EXIT_DONE
    show = partial(print, file=sys.stderr, flush=True)
    wait_for_stop(arguments.run_dir, timeout_s=arguments.timeout, show=show)
    if has_ended(arguments.run_dir):
        found = "{}: {}".format(*state_of(arguments.run_dir))
        print(f"{arguments.run_dir} has ended of itself, before it saw the request; {found}")
        return EXIT_DONE
    print(f"{arguments.run_dir} has ended; {how_it_goes_on(arguments.run_dir)}")
    return EXIT_DONE
