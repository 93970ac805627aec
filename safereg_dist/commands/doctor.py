"""`safereg doctor`: what would fail, before a job is paid for.

safereg doctor CONFIG                             this host
safereg doctor --hostfile F CONFIG                the hosts of a hostfile, over ssh
deepspeed ... --module safereg_dist doctor CONFIG     the ranks of a launcher; torchrun likewise
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from safereg_dist.commands.options import add_config, add_json, example
from safereg_dist.commands.outcome import Outcome, command
from safereg_dist.errors import EXIT_DONE, EXIT_FAILED
from safereg_dist.screen.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example(
        "safereg doctor run.yaml", "safereg doctor run.yaml --hostfile hostfile  # needs the hosts"
    )
    add_config(parser)
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="`HOST slots=N` lines, as for deepspeed; its hosts are examined over ssh",
    )
    parser.add_argument("--port", type=int, default=29500, help="TCP port at which ranks will meet")
    add_json(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Examines and prints; fails where something would."""
    from safereg_dist.config import load_config
    from safereg_dist.doctor.finding import table
    from safereg_dist.doctor.remote import read_hostfile

    config = load_config(arguments.config, list(arguments.overrides))
    hosts = None if arguments.hostfile is None else read_hostfile(arguments.hostfile)
    say("doctor: loads the libraries")  # what is given, above, is read without them
    from safereg_dist.doctor.examine import examine_hosts, examine_ranks
    from safereg_dist.parallel.distributed import distributed_ranks

    shows, about = True, ""
    if hosts is not None:
        found = examine_hosts(config, hosts, port=arguments.port)
    else:
        with distributed_ranks() as ranks:
            found = examine_ranks(config, ranks, port=arguments.port)
            shows = ranks.is_main
            if ranks.world_size == 1:
                about = "figures of one rank on this host; of several hosts: --hostfile FILE\n"
    would_fail = any(each.verdict == "FAIL" for each in found)
    status = EXIT_FAILED if would_fail else EXIT_DONE
    if not shows:
        return Outcome(status=status)
    print(table(found) + about, end="", flush=True)
    now = "" if would_fail else command("audit", arguments.config, *arguments.overrides)
    return Outcome(status=status, figures=[asdict(each) for each in found], now=now)
