"""The `safereg` command: each verb is a file in `commands/`, loaded when asked for."""

import argparse
import errno
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from safereg_dist import errors
from safereg_dist.commands.outcome import finish
from safereg_dist.commands.verbs import VERBS, command_parser
from safereg_dist.models.extras import needed
from safereg_dist.parallel.launchers import adopt_launcher
from safereg_dist.run.terminal import outlive_terminal

SILENT_S = 5.0
"""How long a rank whose error another one prints stays, before there is a group."""


def main(argv: Sequence[str] | None = None, *, hints: bool = True) -> int:
    """Runs one verb; the exit status, one of `errors.EXIT_CODES`.

    `hints`: say the next step after success; off where a program says it.
    """
    # Before torch is loaded: on CPUs that are shared with anything else, OpenMP threads that spin
    # while they wait slow training down many times over (see launch/setup_env.sh).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A model that does not fit is our own one-line error, not the library's report above it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    adopt_launcher()
    try:
        with needed():
            return finish(_arguments(argv), hints=hints)
    except errors.own_errors() as error:
        # Who has lost a rank cannot leave the message to rank 0: that may be the lost one.
        if isinstance(error, errors.PeerLost):
            print(f"safereg: {error}", file=sys.stderr, flush=True)
        elif not _speaks():
            # Launchers end all ranks once one has ended: the one that speaks has to come first.
            time.sleep(0 if _has_group() else SILENT_S)
        else:
            print(f"safereg: {_place()}{error}", file=sys.stderr, flush=True)
            if isinstance(error, errors.RemoteRankError):
                traceback.print_exc()
        return errors.EXIT_REFUSED if errors.is_user_error(error) else errors.EXIT_FAILED
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        # Whatever key or option it came from, it was no path.
        name = errors.printable(error.filename, 80)
        print(f"safereg: expected the name of a file, got {name}: correct it", file=sys.stderr)
        return errors.EXIT_REFUSED
    except KeyboardInterrupt:
        if _speaks():
            print(_INTERRUPTED, file=sys.stderr, flush=True)
        return errors.EXIT_INTERRUPTED


_INTERRUPTED = (
    "safereg: interrupted; what was written is kept (train, score, eval, sweep: the same command "
    "goes on)"
)


def _speaks() -> bool:
    """True on rank 0, which speaks for all; before there is a group on each host's first rank."""
    if os.environ.get("RANK", "0") == "0":
        return True
    return not _has_group() and os.environ.get("LOCAL_RANK", "0") == "0"


def _has_group() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _place() -> str:
    """Where a message comes from, unless it is from rank 0."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank} on {socket.gethostname()}: "


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; exits with status 2 where it does not parse."""
    given = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    parser = command_parser([word for word in given if word in VERBS][:1])
    arguments, rest = parser.parse_known_args(given)
    # argparse stops collecting key=value at the first option: `train C.yaml --dry-run key=value`.
    if "overrides" in arguments and not any(text.startswith("-") for text in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def entry(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `main` as a process of its own and ends it; the status is the process's.

    One of several ranks, or a process with threads of its own (a judge's), ends at once, without
    tearing the interpreter down: threads of gloo or torch that are still alive then have been seen
    to abort a process whose work was done (`terminate called without an active exception`, torch
    2.13), and the launcher to report the run as failed.
    """
    outlive_terminal()
    status = main(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or threading.active_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    entry()
