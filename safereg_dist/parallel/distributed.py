"""The ranks for a verb without a configuration: the launcher's, or this process alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from safereg_dist.errors import GroupError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.launchers import adopt_launcher, require_ranks
from safereg_dist.parallel.lost_peer import naming_lost_peers


@contextmanager
def distributed_ranks() -> Iterator[Ranks]:
    """The ranks that the launcher's environment describes; leaves the group at the end.

    Raises:
        GroupError: the process group cannot be formed.
    Collectives: the rendezvous.
    """
    share_cores()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from safereg_dist.config import EngineConfig
        from safereg_dist.parallel.deepspeed import start_ranks

        ranks = start_ranks(EngineConfig())
    else:
        from safereg_dist.parallel.single import single_ranks

        ranks = single_ranks()
    try:
        with naming_lost_peers():
            yield ranks
    finally:
        leave_group()


def current_ranks() -> Ranks:
    """The ranks of the process group that a program has formed; this process alone without one."""
    cuda = torch.cuda.is_available()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        device = torch.device("cuda" if cuda else "cpu")
        return Ranks(rank=0, world_size=1, local_rank=0, device=device, dp_group=None)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Ranks(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=local_rank,
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        dp_group=torch.distributed.group.WORLD,
    )


def joined_ranks() -> Ranks:
    """As `current_ranks`, for a program that trains.

    Raises:
        GroupError: a launcher started it as one of several, and it has formed no group: each would
            train alone on all rows.
    """
    ranks = current_ranks()
    if ranks.dp_group is not None:
        return ranks
    adopt_launcher()
    started = os.environ.get("WORLD_SIZE")
    if started != "1" and require_ranks():
        raise GroupError(
            f"a launcher started {started} processes, which have formed no group: each would train "
            "alone on all rows; call torch.distributed.init_process_group() (or your engine's, "
            "e.g. deepspeed.init_distributed) before `prepare`"
        )
    return ranks


def share_cores() -> None:
    """Divides a node's cores among its ranks unless the user set a number; CPU training only."""
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, local)))


def leave_group() -> None:
    """Takes NCCL's communicators down, in order and once.

    Gloo's end with the process: taking them down races with their threads (see `cli.entry`).
    """
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if started and torch.distributed.get_backend() == "nccl":
        with suppress(RuntimeError):  # a peer may be gone already
            torch.distributed.destroy_process_group()
