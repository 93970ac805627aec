"""Claimed: a stop file ends a run on all ranks together, with status 75 and a whole checkpoint, and
the same command goes on to the same bits; one that an earlier run left behind stops nothing. Each
rank says in a file of its own how it ended.

Exact: ledger and exported weights against the run that nobody stopped.
"""

import subprocess
import sys

import pytest
from support.builders import write_run
from support.extent import FULL
from support.launching import FINETUNE, descendants, tail

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
LAUNCHERS = {"deepspeed": 75, "torchrun": 1} if FULL else {"preloaded": 75}
"""Launcher -> the status that it makes of its ranks' 75."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    return write_run(
        folder,
        rows=24,
        train={"steps": 60, "precision": "fp32", "micro_batch_size": 2},
        output_dir=str(folder / "whole"),
    )


def result(out):
    return (out / "ledger.jsonl").read_bytes(), (out / "model/model.safetensors").read_bytes()


def stop(out, *options):
    command = [sys.executable, "-m", "safereg_dist", "stop", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_stop_file_ends_all_ranks_together(config, launch, launcher):
    whole, out = config.parent / "whole", config.parent / launcher
    assert stop(out).returncode == 2
    done = launch(FINETUNE, config, ranks=2)
    assert done.status == 0, done.output[-3000:]
    process, log = launch.start(FINETUNE, config, f"output_dir={out}", ranks=2, launcher=launcher)
    while not (out / "metrics.jsonl").is_file():
        assert process.poll() is None, tail(log)
    asked = stop(out, "--wait", "--timeout", "100")
    assert asked.returncode == 0, asked.stderr
    assert process.wait(60) == LAUNCHERS[launcher], tail(log)
    assert not descendants(process.pid)
    assert not (out / "stop").exists()
    (saved,) = (out / "checkpoint").glob("step-*")
    assert 0 < int(saved.name[5:]) < 60
    (out / "stop").touch()  # of somebody who asked when the run had just ended
    again = launch(FINETUNE, config, f"output_dir={out}", ranks=2)
    assert again.status == 0, again.output[-3000:]
    assert result(out) == result(whole)
    for rank in range(2):
        (kept,) = (out / "logs").glob(f"rank{rank:04d}.*.log")
        lines = kept.read_text().splitlines()
        assert [line.split("status ")[1] for line in lines if "ended with" in line] == ["75", "0"]
        assert sum(f"start: rank {rank} of 2" in line for line in lines) == 2
    refused = stop(out)
    assert refused.returncode == 2
    assert "is complete" in refused.stderr
    assert not (out / "stop").exists()


def test_the_doctor_asks_the_ranks_of_a_launcher(config, launch):
    doctor = ("-m", "safereg_dist", "doctor", config, f"output_dir={config.parent / 'sick'}")
    done = launch(*doctor, ranks=2)
    assert done.status == 0, done.output
    assert done.output.count("output_dir is one folder") == 1
    assert " MB/s into rank " in done.output
    done = launch(*doctor, "model=owner/model", ranks=2)
    assert done.status == 0  # a name on the hub, for all that is known
    assert "warn  model " in done.output
    missing = ("model=/nowhere/model", "data.train=/nowhere/rows.jsonl")
    done = launch(*doctor, *missing, ranks=2)
    assert done.status == 1
    assert "/nowhere/rows.jsonl" in done.output
    assert "/nowhere/model" in done.output
    assert not (config.parent / "sick").exists()
    assert not list(config.parent.glob(".doctor*"))
