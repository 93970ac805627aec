"""Claimed: of runs that start in one folder at once one holds it; a dead holder's lock is taken
over without anybody's help, a live one's never; a holder that was taken for dead writes no more.

Real processes. Another host is a lock whose place is not this one: its process cannot be looked at,
so its heartbeat counts (made fast here). Exact.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.launching import ROOT

from safereg_dist.errors import CheckpointError
from safereg_dist.run.lock import RunLock, _own_identity, is_lock

TAKES = """
import sys, time
from pathlib import Path
from safereg_dist.errors import CheckpointError
from safereg_dist.run import lock
folder, at, elsewhere = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "elsewhere"
if elsewhere:  # as on a host of its own: nobody's process can be looked at
    lock._place = lambda: f"host of {lock.os.getpid()}"
own = lock.RunLock(folder, beat_s=0.2, stale_s=1.5)
time.sleep(max(0, at - time.time()))
try:
    while not own.take():
        pass
except CheckpointError as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("held", flush=True)
for _ in sys.stdin:
    pass
own.release()
print("released", flush=True)
"""


def start(folder, at=0.0, *, elsewhere=False):
    arguments = [str(folder), str(at), "elsewhere" if elsewhere else "here"]
    return subprocess.Popen(
        [sys.executable, "-c", TAKES, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"},
    )


def said(process):
    """The first line of its output."""
    return process.stdout.readline().strip()


def end(process):
    process.stdin.close()
    assert process.wait(20) == 0
    process.stdout.close()
    process.stderr.close()


def kill(process):
    process.kill()
    process.communicate()


def take(lock):
    while not lock.take():
        pass


def leave_stale(folder, number=1, **changes):
    """The lock of a process that is gone: its id belongs to this one, which started at another
    time."""
    folder.mkdir(exist_ok=True)
    text = json.dumps({**_own_identity(), "started": "1", **changes})
    (folder / f"run.lock.{number}").write_text(text)


def locks(folder):
    return sorted(path.name for path in folder.iterdir() if is_lock(path))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_of_runs_that_start_at_once_one_holds(tmp_path, elsewhere):
    """Ten races of four, from nothing and from what a killed run left."""
    for race in range(10):
        folder = tmp_path / str(race)
        if race % 2:
            leave_stale(folder, **({"place": "gone"} if elsewhere else {}))
        at = time.time() + 1.0
        racers = [start(folder, at, elsewhere=elsewhere) for _ in range(4)]
        first = [said(racer) for racer in racers]
        assert sum(line == "held" for line in first) == 1, first
        assert sum(line.startswith("refused") for line in first) == 3, first
        assert len(locks(folder)) == 1
        for racer, line in zip(racers, first, strict=True):
            if line == "held":
                end(racer)
            else:
                assert racer.wait(20) == 2
                racer.communicate()
        assert not folder.exists() or locks(folder) == []


def test_the_second_is_told_who_has_it(tmp_path):
    holder = start(tmp_path / "run")
    assert said(holder) == "held"
    with pytest.raises(CheckpointError) as error:
        RunLock(tmp_path / "run").take()
    told = (
        r"output_dir \S+ is in use by another run: host \S+, pid (\d+), since [\d:\- ]+ UTC: wait"
    )
    found = re.match(told, str(error.value))
    assert found is not None, str(error.value)
    assert int(found[1]) == holder.pid
    end(holder)
    assert not (tmp_path / "run").exists()


def test_a_killed_holder_is_followed_at_once(tmp_path):
    for _ in range(3):
        holder = start(tmp_path)
        assert said(holder) == "held"
        kill(holder)
        assert len(locks(tmp_path)) == 1
    began = time.monotonic()
    own = RunLock(tmp_path)
    assert own.take()
    assert time.monotonic() - began < 1
    assert locks(tmp_path) == [own.name]
    own.release()
    assert locks(tmp_path) == []
    assert tmp_path.is_dir()  # it was there before


def test_an_id_that_another_process_has_by_now_is_no_holder(tmp_path):
    leave_stale(tmp_path)
    own = RunLock(tmp_path)
    assert own.take()
    own.release()


def test_another_hosts_holder_lives_while_its_heart_beats(tmp_path):
    holder = start(tmp_path, elsewhere=True)
    assert said(holder) == "held"
    with pytest.raises(CheckpointError, match="in use"):
        take(RunLock(tmp_path, stale_s=1.5))
    kill(holder)
    began = time.monotonic()
    watcher = RunLock(tmp_path, stale_s=1.5)
    take(watcher)
    assert 1.5 < time.monotonic() - began < 6
    watcher.release()


def test_a_holder_that_was_stopped_for_long_writes_no_more(tmp_path):
    holder = start(tmp_path, elsewhere=True)
    assert said(holder) == "held"
    os.kill(holder.pid, signal.SIGSTOP)
    watcher = RunLock(tmp_path, beat_s=0.2, stale_s=1.5)
    take(watcher)
    os.kill(holder.pid, signal.SIGCONT)
    assert holder.wait(20) == 1
    assert "another run writes there now" in holder.communicate()[1]
    assert locks(tmp_path) == [watcher.name]
    watcher.release()


def test_a_lock_that_was_never_written_is_outlived(tmp_path):
    """Its process died between making the file and writing it; or it is no lock of ours."""
    for number, text in enumerate(("", "{", "[]", "\0\0"), start=1):
        (tmp_path / f"run.lock.{number}").write_text(text)
    own = RunLock(tmp_path, stale_s=1.0)
    take(own)
    assert locks(tmp_path) == ["run.lock.5"]
    own.release()


def test_what_a_lock_says_cannot_move_a_terminal(tmp_path):
    leave_stale(tmp_path, host="\x1b[2Jevil\n", started=_own_identity()["started"])
    with pytest.raises(CheckpointError) as error:
        RunLock(tmp_path).take()
    assert str(error.value).isprintable()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunLock(tmp_path / "file").take()
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunLock(Path("/proc/1/run")).take()
