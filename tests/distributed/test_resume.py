"""Claimed: a run that was killed and started again by the same command gives the same bits.

Exact: metrics (but for times and memory), ledger, exported weights. Killed are one rank, and all
ranks while a checkpoint is being written, in one run one after the other; in the full mode each in
a run of its own, under the deepspeed launcher and torchrun. Refused: another configuration.
"""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.extent import FULL
from support.launching import FINETUNE, descendants, kill_session, tail
from support.results import result
from support.watching import last_checkpoint, steps_logged, wait_for

from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
STEPS = 12
DEEPSPEED, TORCHRUN = ("deepspeed", "torchrun") if FULL else ("preloaded", "preloaded")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run with everything that has state: dropout, moving average, probe cache, anchors."""
    folder = tmp_path_factory.mktemp("resume")
    model = tiny_model(seed=0, num_hidden_layers=2, attention_dropout=0.2)
    save_model(folder / "model", model)
    write_jsonl(folder / "train.jsonl", random_rows(40, risk=False))
    write_jsonl(folder / "anchor.jsonl", random_rows(9, seed=5, risk=False))
    generator = torch.Generator().manual_seed(3)
    Probe(
        layer=1,
        pooling="last_prompt_token",
        mean=torch.zeros(32),
        scale=torch.ones(32),
        weight=torch.randn(32, generator=generator),
        bias=0.1,
        threshold=0.4,
        fingerprint=model_fingerprint(model),
        meta={},
    ).save(folder / "probe")
    path = folder / "run.yaml"
    path.write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{train: {folder / 'train.jsonl'}, anchor: {folder / 'anchor.jsonl'}, "
        "anchor_fraction: 0.2}\n"
        f"risk: {{estimator: probe, path: {folder / 'probe'}, max_held_back: 1.0}}\n"
        "regularizer: {schedule: linear, granularity: batch, ema: 0.6}\n"
        "optimizer: {lr: 1.0e-3}\n"
        f"train: {{steps: {STEPS}, precision: fp32, micro_batch_size: 2, grad_accum_steps: 2, "
        "save_every: 2}\n"
        f"output_dir: {folder / 'whole'}\n"
    )
    return path


def rank_processes(process):
    """Process ids of the ranks: children of a launch, or below a launcher by their command line."""
    if not FULL and not torch.cuda.is_available():
        return sorted(descendants(process.pid))
    found = []
    for pid in descendants(process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except FileNotFoundError:
            continue
        if (
            any(w.endswith(b"finetune.py") for w in words)
            and b"deepspeed.launcher.launch" not in words
        ):
            found.append(pid)
    return sorted(found)


def test_killed_and_resumed_runs_give_the_same_bits(config, launch):
    folder = config.parent
    whole = launch(FINETUNE, config, ranks=2)
    assert whole.status == 0, whole.output[-4000:]
    expected = result(folder / "whole")

    one = folder / "one"
    process, log = launch.start(FINETUNE, config, f"output_dir={one}", ranks=2, launcher=DEEPSPEED)
    wait_for(lambda: steps_logged(one) >= 3, process, log)
    os.kill(rank_processes(process)[-1], signal.SIGKILL)
    assert process.wait(120) != 0
    kill_session(process)
    if FULL:
        check_goes_on(config, launch, one, expected)
        cut = folder / "cut"
        killed_while_it_saves(config, launch, cut)
        check_goes_on(config, launch, cut, expected)
    else:
        assert list((one / "checkpoint").glob("step-*"))
        killed_while_it_saves(config, launch, one)
        check_goes_on(config, launch, one, expected)

    check_signal_saves(config, launch, folder / "signal", expected)
    check_refusals(config, launch, folder)


def killed_while_it_saves(config, launch, out):
    """Cuts off a checkpoint of a run, from step 6 on; who comes late takes the next one."""
    while (step := max(last_checkpoint(out), 4) + 2) < STEPS:
        process, log = launch.start(FINETUNE, config, f"output_dir={out}", ranks=2)
        wait_for(partial(is_at_checkpoint, out, step), process, log)
        kill_session(process)
        if last_checkpoint(out) < step:
            return
    raise AssertionError("every kill came after the checkpoint was whole")


def is_at_checkpoint(out, step):
    """Whether a run writes the checkpoint of a step, or has come further."""
    is_writing = list((out / "checkpoint").glob(f".step-{step:08d}.*.partial"))
    return bool(is_writing) or last_checkpoint(out) >= step


def check_goes_on(config, launch, out, expected):
    """The same command goes on to the same bits, and leaves two checkpoints and nothing beside."""
    again = launch(FINETUNE, config, f"output_dir={out}", ranks=2)
    assert again.status == 0, again.output[-4000:]
    assert "resuming from" in again.output
    assert result(out) == expected
    assert not list((out / "checkpoint").glob(".*"))
    assert len(list((out / "checkpoint").glob("step-*"))) == 2


def check_signal_saves(config, launch, out, expected):
    """SIGUSR1 to one rank: all save together, exit with 75, and the next start goes on."""
    never = "train.save_every=0"
    process, log = launch.start(
        FINETUNE, config, f"output_dir={out}", never, ranks=2, launcher=TORCHRUN
    )
    wait_for(lambda: steps_logged(out) >= 3, process, log)
    os.kill(rank_processes(process)[-1], signal.SIGUSR1)
    process.wait(120)
    assert list((out / "checkpoint").glob("step-*")), tail(log)
    assert not (out / "summary.json").exists()
    again = launch(FINETUNE, config, f"output_dir={out}", never, ranks=2)
    assert again.status == 0, again.output[-4000:]
    assert result(out) == expected


def check_refusals(config, launch, folder):
    """Another configuration: one line, status 2, nothing changed."""
    shutil.rmtree(folder / "one" / "model")
    (folder / "one" / "summary.json").unlink()
    before = sorted(p.name for p in (folder / "one").rglob("*"))
    done = launch(FINETUNE, config, f"output_dir={folder / 'one'}", "optimizer.lr=0.5", ranks=2)
    assert done.status == 2
    assert done.output.count("holds a run with another configuration") == 1, done.output[-3000:]
    assert sorted(p.name for p in (folder / "one").rglob("*")) == before
    finished = launch(FINETUNE, config, ranks=2)
    assert finished.status == 0
    assert "already complete" in finished.output
