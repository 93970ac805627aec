"""`safereg doctor`: what would fail, before a job is paid for.

safereg doctor CONFIG                             this host
safereg doctor --hostfile F CONFIG                the hosts of a hostfile, over ssh
deepspeed ... --module safereg_dist doctor CONFIG     the ranks of a launcher; torchrun likewise
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from safereg_dist.commands.options import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_config(parser)
    parser.add_argument("--hostfile", type=Path, help="`HOST slots=N` lines, as for deepspeed")
    parser.add_argument("--port", type=int, default=29500, help="where ranks will meet: 29500")
    parser.add_argument("--json", action="store_true", help="findings as JSON lines")


def run(arguments: argparse.Namespace) -> int:
    """Examines and prints; 1 where something would fail, else 0."""
    from safereg_dist.config import load_config
    from safereg_dist.doctor.examine import examine_hosts, examine_ranks
    from safereg_dist.doctor.finding import table
    from safereg_dist.doctor.remote import read_hostfile
    from safereg_dist.parallel.distributed import distributed_ranks

    config = load_config(arguments.config, list(arguments.overrides))
    shows = True
    if arguments.hostfile is not None:
        found = examine_hosts(config, read_hostfile(arguments.hostfile), port=arguments.port)
    else:
        with distributed_ranks() as ranks:
            found = examine_ranks(config, ranks, port=arguments.port)
            shows = ranks.is_main
    if shows and arguments.json:
        print("\n".join(json.dumps(asdict(each)) for each in found), flush=True)
    elif shows:
        print(table(found), end="", flush=True)
    return int(any(each.verdict == "FAIL" for each in found))
