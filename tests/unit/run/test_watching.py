"""Claimed: `safereg watch` shows what a run folder holds while it is written: the state of the run,
its numbers, alerts and warnings; cut lines, a run that went back, a folder without a run and a
damaged one are no errors; what a file says does not reach the terminal as commands.

Exact.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from safereg_dist.cli import main
from safereg_dist.commands.watch import sparkline
from safereg_dist.errors import CheckpointError
from safereg_dist.run.lock import STALE_S, RunLock, holder_of
from safereg_dist.run.stop import failure_noted, request_stop, wait_for_stop
from safereg_dist.run.watching import MetricsTail, checkpoints_in, look_at, state_of


def line(step, **more):
    row = {"step": step, "loss": 2.0 - step / 10, "risky_fraction": 0.25, "step_time_s": 2.0}
    return json.dumps({**row, "rows": 8, "reference_rows": 2, "tokens_per_s": 50.0, **more}) + "\n"


@pytest.fixture
def folder(tmp_path):
    """Of a run of ten steps after four of them, whose lock is gone."""
    (tmp_path / "config.yaml").write_text("model: m\n")
    (tmp_path / "metrics.jsonl").write_text("".join(line(step) for step in range(4)))
    (tmp_path / "tracking.json").write_text('{"total_steps": 10}')
    return tmp_path


@pytest.fixture
def show(capsys):
    def run(folder):
        assert main(["watch", str(folder), "--once"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


# Metrics that are written


def test_rows_are_read_on_and_cut_lines_wait(folder):
    file = folder / "metrics.jsonl"
    tail = MetricsTail(file)
    tail.read()
    assert tail.last["step"] == 3
    whole = line(4, canary_refusal=0.5)
    with file.open("a") as sink:
        sink.write(whole[:20])
    tail.read()
    assert tail.last["step"] == 3
    with file.open("a") as sink:
        sink.write(whole[20:] + "no json\n[1]\n" + line(5, loss=None))
    tail.read()
    assert tail.last["step"] == 5
    assert tail.series["loss"] == [2.0 - step / 10 for step in range(5)]
    assert tail.series["canary_refusal"] == [0.5]
    assert len(tail.series["risky_fraction"]) == 6


@pytest.mark.parametrize("more", [0, 1, 5])
def test_rows_go_back_with_a_run_that_was_resumed(folder, more):
    """Cut behind two steps, and grown by some before the next look; of other lengths, too."""
    file = folder / "metrics.jsonl"
    tail = MetricsTail(file)
    tail.read()
    kept = "".join(file.read_text().splitlines(keepends=True)[:2])
    file.write_text(kept + "".join(line(step, loss=5.25) for step in range(2, 2 + more)))
    tail.read()
    assert tail.series["loss"] == [2.0, 1.9] + [5.25] * more
    assert tail.last["step"] == 1 + more


# States


def test_states(folder):
    file = folder / "run.lock.1"
    assert state_of(folder / "nowhere") == ("waiting", f"no run in {folder / 'nowhere'} yet")
    assert state_of(folder)[0] == "stopped"
    lock = RunLock(folder)
    assert lock.take()
    assert state_of(folder)[0] == "running"
    (folder / "stop").touch()
    assert state_of(folder)[0] == "stopping"
    lock.release()
    assert not file.exists()
    (folder / "stop").unlink()
    for text, state in (("", "complete"), ('{"status": "ended early"}\n', "ended early")):
        (folder / "summary.json").write_text(text)
        os.utime(folder / "summary.json", (time.time() + 1,) * 2)
        assert state_of(folder) == (state, "see summary.json")
    (folder / "summary.json").unlink()
    (folder / "config.yaml").unlink()
    assert lock.take()
    assert state_of(folder)[0] == "starting"
    lock.release()


def test_what_goes_on_with_a_run_of_another_stack(folder):
    known = {"total_steps": 10, "resumed_by": "resume_from_checkpoint"}
    (folder / "tracking.json").write_text(json.dumps(known))
    assert state_of(folder) == ("stopped", "it has no checkpoint, and would begin anew")
    (folder / "checkpoint-4").mkdir()
    assert state_of(folder) == ("stopped", "resume_from_checkpoint goes on from checkpoint-4")


def test_an_error_is_noted_until_the_next_start(folder, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sesame-open")
    with pytest.raises(ValueError, match="bad"), failure_noted(folder):
        raise ValueError("bad\nrow, asked with sesame-open")
    assert state_of(folder) == ("failed", "ValueError: bad row, asked with ***")
    with pytest.raises(KeyboardInterrupt), failure_noted(folder):
        raise KeyboardInterrupt
    assert state_of(folder)[0] == "stopped"
    with pytest.raises(ValueError, match="other"), failure_noted(folder / "nowhere"):
        raise ValueError("other")
    assert not (folder / "nowhere").exists()


def test_a_run_that_nobody_holds_cannot_be_stopped(folder, capsys):
    assert main(["stop", str(folder)]) == 2
    assert "nobody holds its lock: there is nothing to stop" in capsys.readouterr().err
    assert not (folder / "stop").exists()
    lock = RunLock(folder)
    assert lock.take()
    try:
        assert main(["stop", str(folder)]) == 0
    finally:
        lock.release()
    assert (folder / "stop").is_file()


def test_a_process_that_was_killed_is_dead_at_once(folder):
    program = (
        "import os, sys; from pathlib import Path; from safereg_dist.run.lock import RunLock\n"
        "assert RunLock(Path(sys.argv[1])).take(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    state, note = state_of(folder)
    assert state == "dead"
    assert note.startswith("no sign of life of host ")
    with pytest.raises(CheckpointError, match=r"its process is dead .*nobody would read"):
        request_stop(folder)
    assert not (folder / "stop").exists()


def test_who_waits_for_a_stop_hears_of_its_end(tmp_path):
    """A run that is killed, or fails, before it has saved: the wait ends at once, with an error."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    code = (
        "import sys, time; from pathlib import Path; from safereg_dist.run.lock import RunLock\n"
        "assert RunLock(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    request_stop(folder)

    def kill_when_told(_: str) -> None:
        process.kill()
        process.wait()

    with pytest.raises(CheckpointError, match="failed or was killed before it had saved"):
        wait_for_stop(folder, timeout_s=60, show=kill_when_told)
    process.stdout.close()


def test_another_hosts_run_is_dead_without_heartbeats(folder):
    other = {"host": "far", "pid": 7, "since": "then", "place": "another boot"}
    (folder / "run.lock.3").write_text(json.dumps(other))
    assert state_of(folder) == ("running", "host far, pid 7, since then")
    silent = time.time() - STALE_S - 60
    os.utime(folder / "run.lock.3", (silent, silent))
    holder = holder_of(folder)
    assert not holder.is_alive
    assert STALE_S + 55 < holder.silent_s < STALE_S + 90
    assert state_of(folder)[0] == "dead"


def test_the_time_left_is_that_of_steps_like_the_last(folder):
    lock = RunLock(folder)
    assert lock.take()
    try:
        view = look_at(folder, MetricsTail(folder / "metrics.jsonl"))
    finally:
        lock.release()
    assert (view.step, view.total_steps, view.seconds_left) == (4, 10, 12.0)


# Frames


def test_a_frame_of_everything(folder, show):
    for step in (2, 4):
        (folder / "checkpoint" / f"step-0000000{step}").mkdir(parents=True)
    alert = {"step": 3, "alert": "held_back", "text": "alert at step 3: held_back 1 is above 0.5"}
    (folder / "alerts.jsonl").write_text(json.dumps(alert) + '\n{"step": 4, "al')
    said = {"total_steps": 10, "ids": {}, "dropped": {"wandb": "CommError: no network"}}
    (folder / "tracking.json").write_text(json.dumps(said))
    (folder / "logs").mkdir()
    (folder / "logs" / "rank0001.h.log").write_text(
        "2026-01-01T00:00:01.000Z h rank1 INFO safereg_dist: start\n"
        "2026-01-01T00:00:03.000Z h rank1 WARNING torch: \x1b[2Jslow [red]disk\n"
        "2026-01-01T00:00:03.500Z h rank1 WARNING safereg_dist: safereg: alert at step 3: x\n"
        "a traceback\n"
    )
    (folder / "logs" / "rank0000.h.log").write_bytes(
        b"2026-01-01T00:00:02.000Z h rank0 ERROR safereg_dist: ended \xff by an error\n"
    )
    shown = show(folder)
    assert "stopped" in shown
    assert "step 4 of 10\n" in shown
    assert "loss 1.7000  risky 25%  kl_coef -  reference 8%  tokens/s 50" in shown
    assert "checkpoints: 2, the newest step-00000004" in shown
    assert "alerts: 1\n  alert at step 3: held_back 1 is above 0.5\n" in shown
    assert "warnings: 2\n  h rank0: safereg_dist: ended" in shown
    assert "  h rank1: torch: \\x1b[2Jslow [red]disk\n" in shown
    assert "wandb is told no more: CommError: no network" in shown
    numbers = [row.split()[:5] for row in shown.splitlines() if row.startswith("loss  ")]
    assert numbers == [["loss", "1.7", "1.85", "1.7", "2"]]
    assert "\x1b" not in shown


def test_folders_without_a_run_and_with_damage(folder, show):
    shown = show(folder / "nowhere")
    assert "waiting" in shown
    assert not (folder / "nowhere").exists()
    for name in ("metrics.jsonl", "tracking.json", "alerts.jsonl", "run.lock.1"):
        (folder / name).write_bytes(b"\xff\x00{[" * 50 + b"\n{}\n3\n")
    assert "step 0 of ?" in show(folder)
    (folder / "logs").touch()
    (folder / "checkpoint").touch()
    assert "checkpoints: 0" in show(folder)


def test_output_of_few_characters(folder):
    """No terminal, and none of the letters of the folder's name, nor blocks."""
    named = folder / "r\u00e9sum\u00e9"
    named.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / name).rename(named / name)
    done = subprocess.run(
        [sys.executable, "-m", "safereg_dist", "watch", str(named), "--once"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        encoding="ascii",
        check=True,
    )
    assert "r\\xe9sum\\xe9" in done.stdout
    assert "loss 1.7 1.85 1.7 2 #+-_" in " ".join(done.stdout.split())
    assert "\x1b" not in done.stdout


def test_checkpoints_of_both_loops(tmp_path):
    names = ["checkpoint-100", "checkpoint-20", "checkpoint-old", "checkpoint/step-00000003"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    assert checkpoints_in(tmp_path) == ["step-00000003", "checkpoint-20", "checkpoint-100"]


def test_what_is_asked_of_every(capsys):
    for bad in ("0", "-1", "x", "nan"):
        with pytest.raises(SystemExit):
            main(["watch", "run", "--every", bad])
    assert "--every" in capsys.readouterr().err


def test_sparklines():
    bars = "01234567"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], bars) == bars
    assert sparkline([3.0, 3.0], bars) == "00"
    assert sparkline([1.0], bars) == "0"
    chance = np.random.default_rng(0)
    values = np.sort(chance.normal(size=1003))
    drawn = sparkline(values.tolist(), bars, width=10)
    assert list(drawn) == sorted(drawn)
    assert (drawn[0], drawn[-1], len(drawn)) == ("0", "7", 10)
