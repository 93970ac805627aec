"""Claimed: a configuration with relative paths trains from any folder, by `safereg launch` and by
DeepSpeed's module mode, to the same numbers; the run goes on from another folder.

Two real ranks (gloo), real launchers. Exact: metrics but for times. The command that `--print`
shows is the one that is run.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.launching import ROOT
from support.results import TIMES

from safereg_dist.cli import main as safereg

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with a model, rows and a configuration that names them by relative paths."""
    folder = tmp_path_factory.mktemp("project")
    save_model(folder / "policy", tiny_model(seed=0, num_hidden_layers=2))
    save_model(folder / "reference", tiny_model(seed=1, num_hidden_layers=2))
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "train.jsonl", random_rows(16))
    raw = {
        "model": "policy",
        "reference": {"model": "reference"},
        "data": {"train": "rows/train.jsonl"},
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "train": {"steps": 2, "precision": "fp32", "micro_batch_size": 2},
        "output_dir": "runs/first",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_every_way_to_start_it_trains_the_same(project, launch):
    """Each from the launch's own folder, where nothing of the run is."""
    ways = {
        "first": ("python", ("-m", "safereg_dist", "launch"), ("--nproc", "2")),
        "deepspeed": ("deepspeed", ("--module", "safereg_dist", "train"), ()),
    }
    for name, (launcher, words, options) in ways.items():
        out = f"output_dir={project}/runs/{name}"
        done = launch(*words, project / "run.yaml", *options, out, launcher=launcher)
        assert done.status == 0, done.output
        assert "deepspeed on 2 ranks" in done.output
    first, *others = [metrics(project / "runs" / name) for name in ways]
    assert len(first) == 2
    assert all(other == first for other in others)


def test_fsdp2_and_the_way_on_from_another_folder(project, launch, tmp_path):
    changes = ["engine.name=fsdp2", f"output_dir={project}/runs/fsdp2", "train.save_every=1"]
    words = ("-m", "safereg_dist", "launch", project / "run.yaml", "--nproc", "2", *changes)
    done = launch(*words, launcher="python")
    assert done.status == 0, done.output
    assert "fsdp2 on 2 ranks" in done.output
    # A process of its own, since it begins a group.
    again = [*(sys.executable, "-m", "safereg_dist", "train"), os.path.relpath(project, tmp_path)]
    again[-1] += "/run.yaml"
    done = subprocess.run([*again, *changes], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is already complete" in done.stdout


def test_the_command_that_is_printed(project, capsys, monkeypatch):
    def printed(*words: str) -> list[str]:
        assert safereg(["launch", str(project / "run.yaml"), "--print", *words]) == 0
        path, *rest = shlex.split(capsys.readouterr().out)
        assert path == f"PATH={Path(sys.executable).parent}:$PATH"
        return rest

    run = ["safereg_dist", "train", str(project / "run.yaml")]
    monkeypatch.chdir(project.parent)
    own = ["--num_gpus", "3", "--master_port", "7"]
    words = printed("--nproc", "3", "--master-port", "7", "train.steps=3")
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    assert words == [*runner, *own, "--module", *run, "train.steps=3"]
    own = ["--nproc-per-node", "2", "--master-port", "7", "-m"]
    words = printed("--nproc", "2", "--master-port", "7", "engine.name=fsdp2")
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    assert words == [*torchrun, *own, *run, "engine.name=fsdp2"]
    assert printed("engine.name=single")[1:] == ["-m", *run, "engine.name=single"]
    (project / "hosts").write_text("a slots=2\n")
    words = printed("--hostfile", str(project / "hosts"), "engine.name=fsdp2")
    own = ["--hostfile", str(project / "hosts"), "--master_port", "29500"]
    ssh = "PDSH_SSH_ARGS_APPEND=-o ServerAliveInterval=5 -o ServerAliveCountMax=6"
    assert words == [ssh, *runner, *own, "--module", *run, "engine.name=fsdp2"]


def test_the_page_shows_what_is_run(project, capsys, monkeypatch):
    """The command in the docs, of an installation in /venv, is the one that `--print` shows."""
    page = (ROOT / "docs" / "multi_node.md").read_text().replace("\\\n", " ")
    (told,) = [line for line in page.splitlines() if line.startswith("    PATH=")]
    monkeypatch.chdir(project)
    for name, text in (("mine.yaml", (project / "run.yaml").read_text()), ("hosts", "a slots=2\n")):
        (project / name).write_text(text)
    assert safereg(["launch", "mine.yaml", "--hostfile", "hosts", "--print"]) == 0
    own = told.replace("/venv/bin", str(Path(sys.executable).parent)).replace("/job", str(project))
    assert shlex.split(capsys.readouterr().out) == shlex.split(own, comments=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nproc", "2", "engine.name=single"], "one process"),
        (["--hostfile", "hosts", "engine.name=single"], "one process, got --hostfile"),
        (["--hostfile", "none"], "none cannot be read"),
        (["--hostfile", "no-slots"], "expected `HOST slots=N`, each host once, got 'a'"),
        (["train.stepz=2"], "stepz"),
    ],
)
def test_what_cannot_be_launched(project, words, says, capsys, monkeypatch):
    monkeypatch.chdir(project)
    (project / "no-slots").write_text("a\n")
    (project / "hosts").write_text("a slots=2\n")
    assert safereg(["launch", str(project / "run.yaml"), *words]) == 2
    assert says in capsys.readouterr().err
