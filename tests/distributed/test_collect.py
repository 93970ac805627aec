"""Claimed: `safereg probe fit` on two ranks, or killed and gone on with one, makes the probe that a
single process makes; each rank takes part; an error of one rank ends all with its message.

The judge is the single process, on one thread as each rank is: rounding hangs on the threads.
Exact: the probe's files, bit for bit, since shards do not depend on the number of ranks.
"""

import time

import numpy as np
import pytest
import torch
from support.builders import WORDS, save_model, tiny_model, write_jsonl
from support.launching import kill_session, tail

from safereg_dist.probe_lab.fit import fit_probe

pytestmark = pytest.mark.slow
FILES = ("probe.json", "probe.safetensors")


@pytest.fixture(autouse=True)
def one_thread():
    """This process counts with one thread, as the launched ranks do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def labelled(folder, count=300):
    """Rows whose label is one word; with answers, so that both positions can be fitted."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(count):
        harmful = bool(i % 2)
        words = [str(w) for w in draw.choice(WORDS[10:], size=draw.integers(2, 9))]
        rows.append(
            {
                "prompt": " ".join([*words, "w1" if harmful else "w2"]),
                "response": " ".join([*words[::-1], "w3" if harmful else "w4"]),
                "label": "harmful" if harmful else "benign",
            }
        )
    return write_jsonl(folder / "labelled.jsonl", rows)


def launched_fit(folder, out, *more):
    """Arguments of a launcher for `safereg probe fit`."""
    return [
        *("-m", "safereg_dist", "probe", "fit", "--model", folder / "model"),
        *("--data", folder / "labelled.jsonl", "--out", folder / out),
        *("--layers", "1,2", "--background", "60", "--batch-size", "4", *more),
    ]


def own_fit(folder, out, **more):
    """The same fit in this process."""
    options = {"layers": [1, 2], "background": 60, "batch_size": 4, "progress": False, **more}
    return fit_probe(folder / "model", folder / "labelled.jsonl", folder / out, **options)


def contents(folder):
    return [(folder / name).read_bytes() for name in FILES]


def test_two_ranks_fit_what_one_fits(tmp_path, launch):
    save_model(tmp_path / "model", tiny_model(seed=5))
    labelled(tmp_path)
    both = ("--position", "both", "--work", tmp_path / "states")
    done = launch(*launched_fit(tmp_path, "two", *both))
    assert done.status == 0, done.output[-4000:]
    assert done.output.count("<- chosen") == 2  # one table a position, printed by one rank
    for position in ("prompt", "response"):
        own_fit(tmp_path, f"one/{position}", position=position)
        assert contents(tmp_path / "two" / position) == contents(tmp_path / "one" / position)
        stored = (tmp_path / "states" / position / "states").glob("states-*.safetensors")
        assert len(list(stored)) == 12  # 360 rows, 32 a shard
    assert not list(tmp_path.glob("one/.*")), "the hidden states were left behind"


def test_killed_ranks_leave_whole_shards_for_one_that_goes_on(tmp_path, launch):
    # Big enough that the kill comes in the middle of the collection.
    save_model(tmp_path / "model", tiny_model(seed=5, num_hidden_layers=24, intermediate_size=512))
    labelled(tmp_path, count=1000)
    states = tmp_path / "states" / "states"
    process, log = launch.start(*launched_fit(tmp_path, "probe", "--work", tmp_path / "states"))
    deadline = time.monotonic() + 120
    while len(list(states.glob("states-*.safetensors"))) < 4 and process.poll() is None:
        assert time.monotonic() < deadline, tail(log)
        time.sleep(0.01)
    kill_session(process)
    before = {p.name: p.stat().st_mtime_ns for p in states.glob("states-*.safetensors")}
    assert 4 <= len(before) < 34, tail(log)  # 1060 rows, 32 a shard
    assert not (tmp_path / "probe").exists()
    own_fit(tmp_path, "probe", work=tmp_path / "states")
    after = {p.name: p.stat().st_mtime_ns for p in states.glob("states-*.safetensors")}
    assert len(after) == 34
    assert before.items() <= after.items(), "a shard that was there was made again"
    own_fit(tmp_path, "fresh")
    assert contents(tmp_path / "probe") == contents(tmp_path / "fresh")


def test_an_error_of_one_rank_ends_all(tmp_path, launch):
    save_model(tmp_path / "model", tiny_model(seed=5))
    labelled(tmp_path)
    own_fit(tmp_path, "probe", work=tmp_path / "states")
    # Shard 1 belongs to rank 1, and now its place is taken: that rank alone finds out.
    taken = tmp_path / "states" / "states" / "states-00001.safetensors"
    taken.unlink()
    (taken / "taken").mkdir(parents=True)
    done = launch(*launched_fit(tmp_path, "other", "--work", tmp_path / "states"))
    assert done.status != 0
    assert done.output.count("safereg: rank 1: cannot write") == 1, done.output[-3000:]
    assert not (tmp_path / "other").exists()
