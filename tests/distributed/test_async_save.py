"""Claimed: `train.async_save` changes no bit of a run. Whenever all ranks are killed, in the middle
of the copy too, every checkpoint that is seen is whole, and the same command goes on from the
newest to the bits of an uninterrupted run that saved at once. A stop waits until its checkpoint is
whole. Each engine's checkpoint holds the bytes of one that was written at once.

Exact: metrics (but for times and memory), ledger, exported weights, digests of the files. In a full
run there are more kills, and every engine.
"""

import json
import os
import random
import time
from functools import partial

import pytest
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.extent import FULL, cases
from support.launching import FINETUNE, kill_session, tail
from support.results import result
from support.watching import last_checkpoint, steps_logged, wait_for

from safereg_dist.run.manifest import first_changed, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
STEPS, EVERY = 18, 2
KILLS = 20 if FULL else 4
RANDOM_S = 0.4  # after a step, within which one of these kills comes: a step and its save


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A model of 40 MB in a checkpoint, so that a copy has a middle; with dropout."""
    folder = tmp_path_factory.mktemp("async")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    save_model(folder / "model", tiny_model(seed=0, attention_dropout=0.2, **sizes))
    write_jsonl(folder / "train.jsonl", random_rows(40))
    path = folder / "run.yaml"
    path.write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{train: {folder / 'train.jsonl'}}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "optimizer: {lr: 1.0e-4}\n"
        f"train: {{steps: {STEPS}, precision: fp32, micro_batch_size: 2, save_every: {EVERY}}}\n"
        f"output_dir: {folder / 'at_once'}\n"
    )
    return path


def asynchronous(config, name):
    """Words of a run that is to be told apart by its folder."""
    folder = config.parent
    local = folder / f"{name}-local"
    return [f"output_dir={folder / name}", "train.async_save=true", f"train.save_staging={local}"]


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(config, launch):
    folder, words = config.parent, asynchronous(config, "killed")
    whole = launch(FINETUNE, config, ranks=2)
    assert whole.status == 0, whole.output[-4000:]
    out = folder / "killed"
    for moment in (has_begun, is_copied_in_part, has_one_rank):
        kill_when(partial(moment, out), config, words, launch, out)
    assert last_checkpoint(out) < STEPS - EVERY, "no step is left for the other kills"
    draw = random.Random(0)
    for _ in range(KILLS):
        kill_after(draw.uniform(0, RANDOM_S), config, words, launch, out)
    again = launch(FINETUNE, config, *words, ranks=2)
    assert again.status == 0, again.output[-4000:]
    assert "resuming from" in again.output
    assert result(out) == result(folder / "at_once")
    assert not list((out / "checkpoint").glob(".*"))
    assert not list((folder / "killed-local").iterdir())
    check_costs(out, folder / "at_once")


def kill_when(moment, config, words, launch, out):
    """Kills all ranks where `moment(step)` holds of a save; who comes late takes the next one."""
    while (step := max(last_checkpoint(out), EVERY) + EVERY) < STEPS:
        process, log = launch.start(FINETUNE, config, *words, ranks=2)
        was_seen = []

        def is_time(step=step, was_seen=was_seen):
            if moment(step):
                was_seen.append(step)
            return was_seen or last_checkpoint(out) >= step

        wait_for(is_time, process, log)
        kill_session(process)
        check_whole(out)
        if was_seen and last_checkpoint(out) < step:
            return
    raise AssertionError("every kill came after the checkpoint was whole")


def kill_after(seconds, config, words, launch, out):
    """Kills all ranks so long after the first step that this start has logged."""
    process, log = launch.start(FINETUNE, config, *words, ranks=2)
    before = last_checkpoint(out)
    wait_for(lambda: steps_logged(out) > before, process, log)
    time.sleep(seconds)
    kill_session(process)
    check_whole(out)


def has_begun(out, step):
    """The folder is made, and no file is in it: the ranks write to their own disks."""
    return names_in(out, step) == set()


def is_copied_in_part(out, step):
    """Files are there, and no rank says that its part is whole."""
    found = names_in(out, step)
    return bool(found) and not any(name.endswith(".done") for name in found)


def has_one_rank(out, step):
    """One of two ranks is done."""
    return sum(name.endswith(".done") for name in names_in(out, step) or ()) == 1


def names_in(out, step):
    """The files of a checkpoint that is not whole; None where there is no such folder."""
    folders = list((out / "checkpoint").glob(f".step-{step:08d}.*.partial"))
    found = {name for folder in folders for _, _, names in os.walk(folder) for name in names}
    return found if folders else None


def check_whole(out):
    """Every checkpoint that is seen holds what its manifest says."""
    for path in (out / "checkpoint").glob("step-*"):
        files = read_manifest(path, None).files
        assert first_changed(path, files, files) is None


def check_costs(out, at_once):
    """Training waits for a part of what saving takes; the row after a save says how long."""
    counts = [
        json.loads((run / "summary.json").read_text())["checkpoints"] for run in (out, at_once)
    ]
    for found in counts:
        assert found["saved"] == STEPS // EVERY - 1
        assert 0 < found["blocked_seconds"] <= found["seconds"] * 1.05 + 0.1
    rows = [json.loads(line) for line in (at_once / "metrics.jsonl").read_text().splitlines()]
    blocked = {row["step"]: row["save_blocked_s"] for row in rows if "save_blocked_s" in row}
    assert list(blocked) == list(range(EVERY, STEPS, EVERY))
    assert sum(blocked.values()) == pytest.approx(counts[1]["blocked_seconds"])


def test_a_stop_waits_for_its_checkpoint(config, launch):
    out, words = config.parent / "stopped", [*asynchronous(config, "stopped"), "train.save_every=0"]
    process, log = launch.start(FINETUNE, config, *words, ranks=2)
    wait_for(lambda: steps_logged(out) >= 3, process, log)
    (out / "stop").touch()
    assert process.wait(120) == 75, tail(log)
    assert last_checkpoint(out) >= 3
    check_whole(out)
    assert not (out / "stop").exists()
    assert not list((config.parent / "stopped-local").iterdir())


ENGINES = {
    "zero3": [],
    "fsdp2": ["engine.name=fsdp2"],
    "zero2": ["engine.zero_stage=2", "reference.engine=zero3"],
    "zero1-lora": ["engine.zero_stage=1", "lora={rank: 4}"],
    "zero3-bf16": ["train.precision=bf16"],
    "single": ["engine.name=single"],
}
OF_A_PROCESS = {"state.json", "engine/.metadata", "rank0.safetensors", "rank1.safetensors"}
"""Seconds; a name that torch draws; Python's own generator, which no seed of ours begins."""


@pytest.mark.parametrize(
    "engine", cases(["fsdp2", "zero2"], ["zero3", "zero1-lora", "zero3-bf16", "single"])
)
def test_every_engine_writes_the_same_bytes(config, launch, engine):
    folder, how = config.parent, [*ENGINES[engine], "train.steps=3"]
    ranks = 1 if engine == "single" else 2
    files = []
    for name, words in (
        (f"{engine}-at-once", [f"output_dir={folder / f'{engine}-at-once'}"]),
        (f"{engine}-async", asynchronous(config, f"{engine}-async")),
    ):
        done = launch(FINETUNE, config, *words, *how, ranks=ranks)
        assert done.status == 0, done.output[-4000:]
        whole = folder / name / "checkpoint" / "step-00000002"
        found = read_manifest(whole, None).files
        assert first_changed(whole, found, found) is None
        files.append({name: each for name, each in found.items() if name not in OF_A_PROCESS})
    assert files[0] == files[1]
