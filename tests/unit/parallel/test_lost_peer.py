"""Claimed: where a collective loses a rank, the error is one line that names the collective, the
line of ours that waited and where the peer was; an error of anything else stays what it is.

Real processes and gloo: a rank ends in the middle, and a rank that never comes (a time-out).
"""

import multiprocessing
import os
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from safereg_dist.errors import PeerLost
from safereg_dist.parallel.lost_peer import naming_lost_peers


def message_of_survivor(folder, last_act):
    """What rank 0 says in a collective after rank 1's `last_act`."""

    def run(rank):
        store = dist.FileStore(str(folder / "store"), 2)
        limit = timedelta(seconds=3)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
        dist.all_reduce(torch.ones(3))  # connections are made
        if rank == 1:
            last_act()
            os._exit(0)
        try:
            with naming_lost_peers():
                dist.all_reduce(torch.ones(3))
        except PeerLost as error:
            (folder / "message").write_text(str(error))
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    processes[0].join(40)
    for process in processes:
        process.kill()
        process.join()
    return (folder / "message").read_text()


@pytest.mark.parametrize("last_act", [lambda: None, lambda: time.sleep(30)], ids=["ends", "hangs"])
def test_a_lost_rank_is_one_line(tmp_path, last_act):
    message = message_of_survivor(tmp_path, last_act)
    assert "\n" not in message
    assert "in all_reduce (test_lost_peer.py:" in message
    assert "the same command goes on" in message
    assert ".cc:" not in message


def test_the_peer_s_address_is_told(tmp_path):
    assert "but one at " in message_of_survivor(tmp_path, lambda: None)


def test_a_wait_after_a_time_out_is_told_too():
    """gloo's words where an earlier collective has timed out: seen in an all-gather."""
    with pytest.raises(PeerLost), naming_lost_peers():
        raise RuntimeError("Application timeout caused pair closure")


@pytest.mark.parametrize("text", ["shape mismatch", "CUDA error: timed out", "file closed"])
def test_other_errors_stay_what_they_are(text):
    with pytest.raises(RuntimeError, match=text) as caught, naming_lost_peers():
        raise RuntimeError(text)
    assert not isinstance(caught.value, PeerLost)
