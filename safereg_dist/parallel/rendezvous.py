"""Joining the process group that a launcher describes."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch

from safereg_dist.errors import GroupError, reason_of
from safereg_dist.parallel.comm import Ranks


def join_group(timeout_s: float, form_group: Callable[[str, timedelta], object]) -> Ranks:
    """The ranks of the launcher's environment; this process alone where there is no launcher.

    `form_group(backend, timeout)` forms torch's default group; `timeout_s` is that of a collective.

    Raises:
        GroupError: the launcher's environment is incomplete, or the group cannot be formed.
    Collectives: the rendezvous.
    """
    if "RANK" not in os.environ:
        _pretend_single_launcher()
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    try:
        form_group("nccl" if cuda else "gloo", timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError, KeyError) as err:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise GroupError(
            f"expected to form a process group of {os.environ.get('WORLD_SIZE')} ranks at "
            f"{address}, got: {reason_of(err)}: check that the port is free "
            "(deepspeed --master_port, torchrun --master_port) and the address reachable"
        ) from err
    return Ranks(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
        dp_group=torch.distributed.group.WORLD,
    )


def _pretend_single_launcher() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
