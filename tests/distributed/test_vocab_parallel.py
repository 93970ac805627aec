"""Claimed: a vocabulary spread over tensor-parallel ranks gives what the whole one gives.

Real processes (gloo), 2 and 3 ranks, uneven and empty shards, both paths of the kernels,
value and every gradient against the float64 oracle (4e-5). Exact: the collectives and their bytes;
the loss is the same on every rank to the bit.
"""

from pathlib import Path

import pytest
from support.extent import FULL

WORKER = Path(__file__).parent / "vocab_parallel_worker.py"


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_vocabulary(ranks, launch):
    done = launch(WORKER, ranks=ranks)
    assert done.status == 0, done.output[-6000:]
    counts = {2: 80, 3: 64 if FULL else 56}
    assert f"{counts[ranks]} cases hold" in done.output
