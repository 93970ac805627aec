"""Claimed: in `main_first` the first rank of a node is through before another one begins, and what
it raises every rank raises.

Two processes in a group of their own. Exact.
"""

import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from safereg_dist.errors import DataError
from safereg_dist.parallel.comm import Ranks

RACE_S = 0.5
"""How long the first rank takes: the other one, did it not wait, would be there long before."""


def _join(folder: Path, rank: int) -> Ranks:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    cpu = torch.device("cpu")
    return Ranks(rank=rank, world_size=2, local_rank=rank, device=cpu, dp_group=dist.group.WORLD)


def _build_once(folder: Path, rank: int) -> None:
    ranks = _join(folder, rank)
    with ranks.main_first():
        built = folder / "built"
        (folder / f"found-{rank}").write_text(str(built.exists()))
        if rank == 0:
            time.sleep(RACE_S)
            built.touch()
    os._exit(0)


def _fail_first(folder: Path, rank: int) -> None:
    ranks = _join(folder, rank)
    try:
        with ranks.main_first():
            (folder / f"entered-{rank}").touch()
            if rank == 0:
                raise DataError("row 3 is torn")
    except DataError as err:
        (folder / f"raised-{rank}").write_text(str(err))
    os._exit(0)


def _run_two(work, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(folder, rank)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(40)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def test_the_others_find_what_the_first_rank_has_built(tmp_path: Path) -> None:
    _run_two(_build_once, tmp_path)
    assert (tmp_path / "found-0").read_text() == "False"
    assert (tmp_path / "found-1").read_text() == "True"


def test_what_the_first_rank_raises_all_raise(tmp_path: Path) -> None:
    _run_two(_fail_first, tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.glob("raised-*")} == {
        "raised-0": "row 3 is torn",
        "raised-1": "row 3 is torn",
    }
    assert not (tmp_path / "entered-1").exists()
