"""Claimed: two ranks that see other files, keys or folders stop before weights are loaded, with one
line that names the host and the difference; ranks with equal copies train; MPI ranks are ranks.

Real processes: each rank runs in a folder of its own, as on a host with disks of its own. Exact.
"""

import functools
import os
import shutil
import socket
import subprocess
import sys

import pytest
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.extent import FULL
from support.launching import FINETUNE, ROOT, Launcher, free_port, kill_session

from safereg_dist.run.ledger import verify_ledger

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
HOST = socket.gethostname()


@pytest.fixture
def hosts(tmp_path):
    """Two folders with equal copies of everything, and a shared one for output."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    save_model(first / "policy", tiny_model(num_hidden_layers=1))
    write_jsonl(first / "train.jsonl", random_rows(8))
    (first / "run.yaml").write_text(
        "model: policy\n"
        "data: {train: train.jsonl}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "train: {steps: 1, precision: fp32, micro_batch_size: 2}\n"
        "engine: {name: fsdp2, timeout_s: 60}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    shutil.copytree(first, second)
    return first, second


launcher_of = functools.cache(Launcher)
"""The launcher of a host's folder, which numbers its logs."""


def start_both(hosts, *arguments, env=None):
    """Both ranks, as a launcher starts them; `env` is the second one's."""
    port = str(free_port())
    started = []
    for rank, folder in enumerate(hosts):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": port}
        variables |= {"MASTER_ADDR": "127.0.0.1", "SAFEREG_CACHE": str(folder / "cache")}
        variables |= (env or {}) if rank == 1 else {}
        started.append(
            launcher_of(folder).start(
                FINETUNE, "run.yaml", *arguments, launcher="forked", env=variables
            )
        )
    return started


def run_both(hosts, *arguments, env=None):
    """Statuses of both ranks, and what both printed."""
    started = start_both(hosts, *arguments, env=env)
    try:
        statuses = [process.wait(150) for process, _ in started]
    finally:
        for process, _ in started:
            if process.poll() is None:
                kill_session(process)
    return statuses, "".join(log.read_text(errors="replace") for _, log in started)


def message_of(hosts, *arguments, env=None):
    """The one line with which both ranks stop, nothing written."""
    statuses, output = run_both(hosts, *arguments, env=env)
    assert statuses == [2, 2], output[-3000:]
    (line,) = [text for text in output.splitlines() if text.startswith("safereg: ")]
    assert not (hosts[0].parent / "out").exists()
    return line


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip_a_byte(path):
    """Of the last tensor; size and times stay, as after a disk's fault that nobody noticed."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_key_is_named(hosts):
    edit(hosts[1] / "run.yaml", "steps: 1,", "steps: 1, save_every: 7,")
    edit(hosts[1] / "run.yaml", "model: policy\n", "model: policy\noptimizer: {lr: 0.25}\n")
    line = message_of(hosts)
    assert (
        f"{HOST} (rank 1) differs from {HOST} (rank 0) in optimizer.lr (0.25, there 1e-05)" in line
    )
    assert "train.save_every (7, there 0)" in line


def test_other_rows_and_weights_are_named(hosts):
    rows = (hosts[1] / "train.jsonl").read_text().splitlines()
    (hosts[1] / "train.jsonl").write_text("\n".join([*rows[1:], rows[0]]) + "\n")
    flip_a_byte(hosts[1] / "policy" / "model.safetensors")
    (hosts[1] / "policy" / "more.safetensors").write_bytes(b"")
    line = message_of(hosts)
    assert "(rank 1) differs from" in line
    assert "data.train (" in line
    assert "model/model.safetensors (" in line
    assert "model/more.safetensors (0 bytes, there none)" in line


def test_another_kernel_path_is_named(hosts):
    line = message_of(hosts, env={"SAFEREG_KERNELS": "eager"})
    assert "variable SAFEREG_KERNELS (eager, there none)" in line


def test_a_run_folder_that_is_not_shared_is_named(hosts):
    for folder in hosts:
        edit(folder / "run.yaml", str(hosts[0].parent / "out"), "out")
    line = message_of(hosts)
    said = "out is not one folder for all ranks"
    assert f"output_dir {hosts[0] / said}: rank 0 on {HOST} wrote run.lock.1" in line
    assert f"{HOST} (rank 1) cannot see it" in line
    assert not (hosts[0] / "out").exists()


def test_equal_copies_train(hosts):
    statuses, output = run_both(hosts)
    assert statuses == [0, 0], output[-3000:]
    out = hosts[0].parent / "out"
    assert (out / "summary.json").is_file()
    assert not list(out.glob("run.lock*"))
    stamp = (out / "summary.json").stat().st_mtime_ns
    statuses, output = run_both(hosts)  # rank 0 alone finds that it is complete
    assert statuses == [0, 0], output[-3000:]
    assert "already complete" in output
    assert (out / "summary.json").stat().st_mtime_ns == stamp


def test_a_host_without_the_configuration_says_so_itself(hosts):
    """The others only wait for it."""
    (hosts[1] / "run.yaml").unlink()
    (waits, _), (process, log) = start_both(hosts)
    try:
        assert process.wait(60) == 2
    finally:
        kill_session(waits)
    expected = f"safereg: rank 1 on {HOST}: expected a configuration file, found none at run.yaml"
    assert expected in log.read_text()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun (Open MPI) on this machine")
def test_open_mpi_ranks_are_ranks_of_one_run(hosts):
    """Also through the deepspeed launcher, with SAFEREG_TESTS=full."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {**allowed, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    (hosts[0] / "hostfile").write_text("localhost slots=2\n")
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hostfile"]
    deepspeed += ["--launcher", "openmpi", "--force_multi", "--no_ssh_check"]
    deepspeed += ["--master_addr", "127.0.0.1"]  # else it asks over ssh
    starts = [["mpirun", "--oversubscribe", "-n", "2", sys.executable], *([deepspeed] * FULL)]
    for index, start in enumerate(starts):
        out = hosts[0].parent / f"mpi-{index}"
        done = subprocess.run(
            [*start, str(FINETUNE), "run.yaml", f"output_dir={out}"],
            env=environment,
            cwd=hosts[0],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "fsdp2 on 2 ranks" in done.stdout
        assert (out / "summary.json").is_file()


def test_of_two_runs_of_two_ranks_one_trains(hosts):
    """Started at the same moment in one folder; the other is refused, or finds it complete."""
    both = [start_both(hosts), start_both(hosts)]
    every = [pair for run in both for pair in run]
    try:
        ends = [[process.wait(200) for process, _ in run] for run in both]
    finally:
        for process, _ in every:
            if process.poll() is None:
                kill_session(process)
    printed = ["".join(log.read_text(errors="replace") for _, log in run) for run in both]
    trained = [text for text in printed if "fsdp2 on 2 ranks" in text]
    assert len(trained) == 1, printed
    other = printed[1 - printed.index(trained[0])]
    assert "is in use by another run: host" in other or "already complete" in other, other
    assert sorted(ends) in ([[0, 0], [0, 0]], [[0, 0], [2, 2]])
    assert verify_ledger(hosts[0].parent / "out") is not None
