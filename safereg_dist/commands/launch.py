"""`safereg launch`: the launcher that fits a configuration, from any folder.

    safereg launch CONFIG [key=value ...]                 all GPUs of this host, else one process
    safereg launch CONFIG --nproc 4 [key=value ...]       so many ranks on this host
    safereg launch CONFIG --hostfile F [key=value ...]    the hosts of a hostfile, over ssh
    safereg launch CONFIG --print                         the command, which is not run

`engine.name` says which: deepspeed's, torchrun for `fsdp2`, none for `single`. Hosts of a hostfile
are always started by deepspeed's, whose ranks run any engine.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from safereg_dist.commands.options import add_config, at_least, example
from safereg_dist.errors import ConfigError
from safereg_dist.models.extras import require
from safereg_dist.parallel.launchers import free_port

PATIENT_SSH = "-o ServerAliveInterval=5 -o ServerAliveCountMax=6"
"""pdsh waits for its ssh connections, which by themselves notice a host without power or network
only after TCP's two hours; `PDSH_SSH_ARGS_APPEND` of your own is kept."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example(
        "safereg launch run.yaml --nproc 4",
        "safereg launch run.yaml --hostfile hostfile  # needs the hosts",
    )
    add_config(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--nproc", type=at_least(1), help="ranks on this host (default: its GPUs)")
    where.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="`HOST slots=N` lines, started over ssh"
    )
    parser.add_argument(
        "--master-port",
        type=at_least(1),
        help="TCP port where ranks meet (default: a free one; with --hostfile 29500)",
    )
    parser.add_argument("--print", action="store_true", help="print the command, run nothing")


def run(arguments: argparse.Namespace) -> int:
    """Runs the launcher in this process's place; its exit status. With --print 0.

    Raises:
        ConfigError: as `train`, before any rank is started; or as `read_hostfile`.
    """
    from safereg_dist.config import load_config
    from safereg_dist.doctor.remote import read_hostfile

    config = load_config(arguments.config, arguments.overrides)
    if arguments.hostfile is not None:
        read_hostfile(arguments.hostfile)  # deepspeed's own words come late
    words = command_of(
        config.engine.name,
        [str(arguments.config.absolute()), *arguments.overrides],
        ranks=arguments.nproc,
        hostfile=arguments.hostfile,
        port=arguments.master_port,
    )
    # Compilers of extensions are looked for on the PATH, beside the interpreter.
    folder = str(Path(sys.executable).parent)
    ssh = os.environ.get("PDSH_SSH_ARGS_APPEND", PATIENT_SSH)
    if arguments.print:
        told = "" if arguments.hostfile is None else f"PDSH_SSH_ARGS_APPEND={shlex.quote(ssh)} "
        print(f"PATH={shlex.quote(folder)}:$PATH {told}{shlex.join(words)}")
        return 0
    require(words[2].partition(".")[0])
    sys.stdout.flush()
    path = os.pathsep.join([folder, os.environ["PATH"]])
    os.execve(words[0], words, {**os.environ, "PATH": path, "PDSH_SSH_ARGS_APPEND": ssh})


def command_of(
    engine: str,
    train: Sequence[str],
    *,
    ranks: int | None = None,
    hostfile: Path | None = None,
    port: int | None = None,
) -> list[str]:
    """The command line that trains, with this interpreter.

    Args:
        engine: `engine.name`.
        train: the arguments of `safereg train`.
        ranks: on this host; None = its GPUs, or one.
        hostfile: in place of `ranks`.
        port: at which ranks meet; None = a free one, of several hosts 29500.
    Raises:
        ConfigError: several ranks or hosts for the engine of one process.
    """
    python, module = [sys.executable, "-m"], ["safereg_dist", "train", *train]
    if hostfile is not None:
        if engine == "single":
            raise ConfigError(
                "engine.name=single is one process, got --hostfile: leave it out, or set "
                "engine.name=deepspeed or fsdp2"
            )
        own = ["--hostfile", str(hostfile.absolute()), "--master_port", str(port or 29500)]
        return [*python, *_DEEPSPEED, *own, "--module", *module]
    if engine == "single":
        if (ranks or 1) > 1:
            raise ConfigError(
                f"engine.name=single is one process, got --nproc {ranks}: leave --nproc out, or "
                "set engine.name=deepspeed or fsdp2"
            )
        return [*python, *module]
    ranks, port = ranks or _gpus() or 1, port or free_port()
    if engine == "fsdp2":
        own = ["--nproc-per-node", str(ranks), "--master-port", str(port), "-m"]
        return [*python, "torch.distributed.run", *own, *module]
    own = ["--num_gpus", str(ranks), "--master_port", str(port), "--module"]
    return [*python, *_DEEPSPEED, *own, *module]


_DEEPSPEED = ("deepspeed.launcher.runner", "--log_level", "warning")
"""Its launcher, which otherwise writes a page before our first line."""


def _gpus() -> int:
    """GPUs of this host, in a process of its own: this one must not open any."""
    code = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return int(found.stdout or 0)
