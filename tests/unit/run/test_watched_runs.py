"""Claimed: a real run tells its trackers, raises alerts against what was counted before it, stops
on one where it is told to and goes on; all of it changes no bit of what is trained. `safereg watch`
follows it in a terminal to its end.

Exact: ledger and weights against a run that nobody watches.
"""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from support.builders import random_rows, save_model, tiny_model, write_jsonl, write_run
from support.launching import FINETUNE, ROOT

from safereg_dist.config import load_config
from safereg_dist.factory import build_run, start_backend
from safereg_dist.run.resume import find_checkpoint
from safereg_dist.run.status import reference_share, status_of
from safereg_dist.trainer import EXIT_REQUEUE, train

STEPS, ROWS_PER_STEP = 6, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of six steps over 24 rows, of which a quarter is risky."""
    folder = tmp_path_factory.mktemp("watched")
    save_model(folder / "model", tiny_model())
    rows = [
        {**row, "risk": 0.9 if place % 4 == 0 else 0.1}
        for place, row in enumerate(random_rows(STEPS * ROWS_PER_STEP))
    ]
    write_jsonl(folder / "train.jsonl", rows)
    prompts = [{"prompt": f"w{place} w2", "label": "harmful"} for place in range(3)]
    write_jsonl(folder / "canary.jsonl", prompts)
    run = {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "train.jsonl")},
        "risk": {"estimator": "column", "max_held_back": 0.4},
        "eval": {"canary": str(folder / "canary.jsonl"), "canary_every": 2},
        "train": {"steps": STEPS, "precision": "fp32", "micro_batch_size": ROWS_PER_STEP},
        "engine": {"name": "single"},
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(world, name, *changes):
    """One start of a run, in this process: its status."""
    config = load_config(world / "run.yaml", [f"output_dir={world / name}", *changes])
    run = build_run(config, start_backend(config))
    return train(run, find_checkpoint(config, run.ranks))


def result(out):
    return (out / "ledger.jsonl").read_bytes(), (out / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(world):
    assert start(world, "alone", "tracking.to=[]", "tracking.alerts=null") == 0
    assert not (world / "alone" / "tensorboard").exists()
    return result(world / "alone")


def test_a_run_without_news_raises_no_alert(world, alone):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert start(world, "calm") == 0
    out = world / "calm"
    assert result(out) == alone
    metrics = lines(out / "metrics.jsonl")
    assert sum(row["risky_fraction"] for row in metrics) / STEPS == pytest.approx(0.25)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tracking"] == {"to": ["tensorboard"], "dropped": {}, "alerts": {}}
    assert not (out / "alerts.jsonl").exists()
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    for name, key in {
        "train/loss": "loss",
        "train/safereg/risky_fraction": "risky_fraction",
    }.items():
        found = board.Scalars(name)
        assert [each.step for each in found] == list(range(STEPS))
        assert [each.value for each in found] == pytest.approx([row[key] for row in metrics])
    looks = board.Scalars("train/safereg/canary_refusal")
    assert [each.step for each in looks] == [1, 3, 5]


def test_an_alert_stops_the_run_which_then_goes_on(world, alone, capfd):
    """Of a band that the first risky row leaves; the second start has seen it already."""
    band = ("tracking.alerts.held_back={max: 0.1, steps: 1}", "tracking.alerts.stop=true")
    assert start(world, "stopped", *band) == EXIT_REQUEUE
    out = world / "stopped"
    shares = [row["risky_fraction"] for row in lines(out / "metrics.jsonl")]
    first = next(step for step, share in enumerate(shares) if share > 0.1)
    assert len(shares) == first + 2  # the flag goes with the next step
    (alert,) = lines(out / "alerts.jsonl")
    assert (alert["step"], alert["alert"], alert["limit"]) == (first, "held_back", 0.1)
    assert alert["value"] == shares[first]
    said = capfd.readouterr().err
    assert said.count(f"alert at step {first}: held_back") == 1
    assert "the run saves and stops" in said
    (saved,) = (out / "checkpoint").glob("step-*")
    state = json.loads((saved / "state.json").read_text())
    assert state["held_back"] == 0.25
    for _ in range(STEPS):
        if start(world, "stopped", *band) == 0:
            break
    assert result(out) == alone
    shares = [row["risky_fraction"] for row in lines(out / "metrics.jsonl")]
    raised = [
        step
        for step, share in enumerate(shares)
        if share > 0.1 and (step == 0 or not shares[step - 1] > 0.1)
    ]
    assert [each["step"] for each in lines(out / "alerts.jsonl")] == raised
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tracking"]["alerts"] == {"held_back": len(raised)}


def test_the_share_that_was_counted_is_the_baseline(world, tmp_path):
    """A stream whose first 64 rows, which are looked at before the run, are harmless, and no other:
    at most 4.6 % are held back, so chance makes 3 of 8 in a step, not more."""
    rows = [{**row, "risk": 0.9 * (n >= 64)} for n, row in enumerate(random_rows(96))]
    stream = (
        f"data.train={write_jsonl(tmp_path / 'stream.jsonl', rows)}",
        *("data.streaming=true", "data.shuffle_buffer=1", "risk.gate_rows=64", "eval=null"),
        *("train.steps=12", "train.micro_batch_size=8"),
    )
    assert start(world, "stream", *stream) == 0
    out = world / "stream"
    shares = [row["risky_fraction"] for row in lines(out / "metrics.jsonl")]
    assert shares == [0.0] * 8 + [1.0] * 4
    (alert,) = lines(out / "alerts.jsonl")
    assert (alert["step"], alert["alert"], alert["limit"]) == (10, "held_back", 3 / 8)


def test_status():
    row = {"loss": 1.23456, "risky_fraction": 0.125, "kl_coef_mean": 0.1, "rows": 8}
    row |= {"reference_rows": 2, "tokens_per_s": 12345.6}
    assert status_of(row) == {
        "loss": "1.2346",
        "risky": "12%",
        "kl_coef": "0.10",
        "reference": "8%",
        "tokens/s": "12,346",
    }
    assert reference_share({"rows": 8, "reference_rows": 8}) == 0.25  # one forward in four
    assert reference_share({"rows": 0, "reference_rows": 0}) == 0.0
    assert set(status_of({"loss": None}).values()) == {"-", "0%"}


def all_of(terminal):
    """What is written to a terminal until nobody has it open."""
    seen = b""
    with suppress(OSError):
        while True:
            seen += os.read(terminal, 10_000)
    return seen


def test_watch_follows_a_run_in_a_terminal(tmp_path):
    """It is there before the run, and ends with it."""
    out = tmp_path / "out"
    config = write_run(
        tmp_path,
        rows=8,
        train={"steps": 60, "precision": "fp32", "micro_batch_size": 2, "save_every": 20},
        engine={"name": "single"},
        output_dir=str(out),
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="120", LINES="40", PYTHONIOENCODING="utf-8")
        os.environ["PYTHONPATH"] = f"{ROOT / 'kernels'}:{ROOT}"
        watch = [sys.executable, "-m", "safereg_dist", "watch", str(out), "--every", "0.1"]
        os.execv(sys.executable, watch)
    seen = b""
    while b"waiting" not in seen:
        seen += os.read(terminal, 1000)
    bar, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 120))
    trained = subprocess.Popen([sys.executable, str(FINETUNE), str(config)], stderr=slave)
    os.close(slave)
    with ThreadPoolExecutor() as pool:
        drawn = pool.submit(all_of, bar)
        seen += all_of(terminal)
        assert trained.wait(30) == 0
        shown = r"loss=[\d.]+, risky=\d+%, kl_coef=[\d.]+, reference=\d+%, tokens/s="
        assert re.search(shown, drawn.result().decode())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    running = r"  running  [^\n]*\n(?:[^\n]*\n)?step \d+ of 60, about 0:00:\d\d left"
    assert re.search(running, text.replace("\r", ""))
    last = text[text.rindex("step 60 of 60") :]
    assert "checkpoints: 2, the newest step-00000040" in last
    assert re.search(r"loss +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\u2581-\u2588]{40}", last)
    assert "complete" in text
