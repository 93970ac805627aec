"""Ranks without a launcher: this process alone, and forked ones in a group of their own."""

import json
import multiprocessing
import os
from datetime import timedelta

import torch
from torch import distributed as dist

from safereg_dist.parallel.comm import Ranks

TIMEOUT_S = 40
ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), dp_group=None)


def on_ranks(world_size, work, folder):
    """What `work(ranks)` gives on each rank, as JSON; a rank that hangs or dies fails the test."""

    def run(rank):
        torch.set_num_threads(1)  # threads of the parent did not come along
        store = dist.FileStore(str(folder / "store"), world_size)
        limit = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=limit
        )
        ranks = Ranks(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            device=ALONE.device,
            dp_group=dist.group.WORLD,
        )
        (folder / f"{rank}.json").write_text(json.dumps(work(ranks)))
        dist.barrier()
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
        process.kill()
    found = [folder / f"{rank}.json" for rank in range(world_size)]
    assert all(path.is_file() for path in found), [path.name for path in found if path.is_file()]
    return [json.loads(path.read_text()) for path in found]
