"""Joining the process group that a launcher describes."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch

from safereg_dist.errors import GroupError, reason_of
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.launchers import adopt_launcher, free_port, require_ranks


def join_group(timeout_s: float, form_group: Callable[[str, timedelta], object]) -> Ranks:
    """The ranks of the launcher's environment; this process alone where there is no launcher.

    `form_group(backend, timeout)` forms torch's default group; `timeout_s` is that of a collective.

    Raises:
        GroupError: the launcher's environment is incomplete, the group cannot be formed, or other
            hosts cannot reach this one.
    Collectives: the rendezvous.
    """
    adopt_launcher()
    if not require_ranks():
        _pretend_single_launcher()
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        _require_gpu(local_rank)
        torch.cuda.set_device(local_rank)
    else:
        _require_own_address()
    try:
        form_group("nccl" if cuda else "gloo", timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError, KeyError) as err:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        variable = "NCCL_SOCKET_IFNAME" if cuda else "GLOO_SOCKET_IFNAME"
        raise GroupError(
            f"expected to form a process group of {os.environ.get('WORLD_SIZE')} ranks at "
            f"{address}, got: {reason_of(err)}: check that the port is free "
            "(deepspeed --master_port, torchrun --master_port), the address reachable, and that "
            f"every host is reached under its own name (else set {variable} to its network "
            "interface, e.g. eth0)"
        ) from err
    return Ranks(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
        dp_group=torch.distributed.group.WORLD,
    )


def _require_gpu(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count or ("LOCAL_RANK" not in os.environ and count > 1):
        raise GroupError(
            f"expected LOCAL_RANK to number the ranks of this host, below its {count} visible GPUs "
            f"(one for each rank), got {os.environ.get('LOCAL_RANK')}: set it, start fewer ranks, "
            "or let each see all GPUs of its host (Slurm: --gpus-per-node, not --gpus-per-task)"
        )


def _require_own_address() -> None:
    """Raises GroupError where gloo would tell other hosts to reach this one at 127.x.

    gloo gives away the address of the host's own name. Debian's installer puts that at 127.0.1.1:
    the host itself then fails at once, and the others wait for it.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    spans_hosts = local is not None and int(local) < int(os.environ["WORLD_SIZE"])
    if not spans_hosts or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as err:
        address = f"nothing ({err})"
    if address.startswith(("127.", "nothing")):
        raise GroupError(
            f"the ranks are on several hosts, but {host}'s own name resolves to {address}, where "
            "no other host reaches it: set GLOO_SOCKET_IFNAME to its network interface (e.g. "
            "eth0; NCCL_SOCKET_IFNAME on GPUs), or give the name its address in /etc/hosts"
        )


def _pretend_single_launcher() -> None:
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
