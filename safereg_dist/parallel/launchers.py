"""Launchers that say a process's rank in variables of their own: theirs become torch's.

deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. MPI and Slurm
do not, and a rank that takes itself to be alone would train beside the others in one folder.
"""

import os
import re
import socket
import zlib
from collections.abc import MutableMapping
from typing import NamedTuple

from safereg_dist.errors import GroupError

Environment = MutableMapping[str, str]


class _Launcher(NamedTuple):
    """Where a launcher says what; of several variables the first that is set counts."""

    name: str
    rank: str
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    nodes: tuple[str, ...]
    """Names of the hosts; rank 0 is on the first."""
    job: tuple[str, ...]
    """The same on all ranks, another one for another run: the port is made of them."""


# Open MPI and MPICH start their daemons with srun inside an allocation, so that SLURM_PROCID is the
# daemon's: they come first. The first of them that is set decides.
_LAUNCHERS = (
    _Launcher(
        "Open MPI",
        rank="OMPI_COMM_WORLD_RANK",
        size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        nodes=("SLURM_JOB_NODELIST",),
        job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Launcher(
        "PMI (MPICH, Intel MPI)",
        rank="PMI_RANK",
        size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "SLURM_LOCALID"),
        local_size=("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE"),
        nodes=("SLURM_JOB_NODELIST",),
        job=("SLURM_JOB_ID", "PALS_APID"),
    ),
    _Launcher(
        "Slurm",
        rank="SLURM_PROCID",
        size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_rank=("SLURM_LOCALID",),
        local_size=(),
        nodes=("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
    _Launcher("PMIx", rank="PMIX_RANK", size=(), local_rank=(), local_size=(), nodes=(), job=()),
)
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def adopt_launcher(environment: Environment | None = None) -> None:
    """Sets torch's variables, so far as they are known, where a launcher has set only its own.

    Does nothing where RANK is set, or where a launcher started a single process. What stays
    unknown is refused where the ranks meet (`require_ranks`).
    """
    env = os.environ if environment is None else environment
    launcher = _launcher_of(env)
    if launcher is None or "RANK" in env:
        return
    size = _first(launcher.size, env)
    if size == "1":
        return
    local_size = _first(launcher.local_size, env)
    is_one_host = local_size == size if local_size else env.get("SLURM_STEP_NUM_NODES") == "1"
    if is_one_host:
        master, local_size = "127.0.0.1", size
    else:
        master = first_host(_first(launcher.nodes, env))
    known = {
        "RANK": env[launcher.rank],
        "WORLD_SIZE": size,
        "LOCAL_RANK": _first(launcher.local_rank, env),
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": master,
        "MASTER_PORT": _port_of([env[name] for name in launcher.job if name in env]),
    }
    for name, value in known.items():
        if value:
            env.setdefault(name, value)


def require_ranks(environment: Environment | None = None) -> bool:
    """Whether a launcher started several processes, whose variables are then complete.

    Raises:
        GroupError: some are missing; the message says which.
    """
    env = os.environ if environment is None else environment
    launcher = _launcher_of(env)
    is_started = "RANK" in env or int(env.get("WORLD_SIZE", "1")) > 1
    if not is_started and (launcher is None or _first(launcher.size, env) == "1"):
        return False
    missing = [name for name in _NEEDED if name not in env]
    if missing:
        who = "a launcher" if launcher is None else f"{launcher.name} ({launcher.rank} is set)"
        raise GroupError(
            f"{who} started this process as one of several, but {', '.join(missing)} cannot be "
            "known from its variables: set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a "
            "free port for all ranks (mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500), and RANK, "
            "WORLD_SIZE and LOCAL_RANK where they are named here; or use deepspeed or torchrun"
        )
    return True


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: `gpu[07-09,12],login` gives `gpu07`."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def _launcher_of(env: Environment) -> _Launcher | None:
    found = (each for each in _LAUNCHERS if each.rank in env)
    # Shells of an allocation have Slurm's variables too; only a step has started processes.
    steps = (
        each
        for each in found
        if each.name != "Slurm" or "SLURM_STEP_NUM_TASKS" in env or "SLURM_STEP_ID" in env
    )
    return next(steps, None)


def _first(names: tuple[str, ...], env: Environment) -> str:
    return next((env[name] for name in names if name in env), "")


def _port_of(job: list[str]) -> str:
    """Below the ports that a system gives away itself (from 32768 on); torch's own without job."""
    return str(20000 + zlib.crc32(" ".join(job).encode()) % 12000) if job else "29500"


def free_port() -> int:
    """A TCP port of this machine that nobody listens at, for ranks of one host to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
