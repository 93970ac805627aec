"""Claimed: a `Recorder` keeps the folder of a loop of one's own as a run of ours is kept. What it
did not write it never removes; settings that changed are refused at the resume; a stop that is
honoured goes on, and one that comes too late is forgotten.

Exact, with real steps of a small model.
"""

import json
from pathlib import Path
from threading import Timer

import pytest
import torch
import yaml
from support.builders import tiny_model
from support.launching import ROOT
from support.pages import python_of
from support.ranks import on_ranks
from transformers import AutoModelForCausalLM

from safereg_dist import collate, prepare, row_of
from safereg_dist.cli import main as safereg
from safereg_dist.errors import CheckpointError
from safereg_dist.evaluate.report.reading import read_arms
from safereg_dist.evaluate.report.summary import method_of, risk_of
from safereg_dist.integrations.recorder import Recorder
from safereg_dist.run.ledger import verify_ledger
from safereg_dist.run.watching import MetricsTail, look_at, state_of

ROWS = [
    row_of("a", [1, 9, 8, 7, 2], [0, 0, 1, 1, 1], risk=0.1),
    row_of("b", [1, 5, 6, 2, 11, 12], [0, 0, 0, 1, 1, 0], risk=0.75),
]
LOOPS = ROOT / "docs" / "stacks" / "loops.md"


class Loop:
    """A loop of one's own whose state is in `folder/state`."""

    def __init__(self, folder, *, told=None, **rule):
        self.folder, self.state, self.step = folder, folder / "state" / "safereg", 0
        self.model = tiny_model()
        settings = {"risk": {"estimator": "column"}, "regularizer": rule}
        settings["train"] = {"precision": "fp32"}
        regularizer = prepare(self.model, settings, reference=tiny_model(seed=1))
        self.regularizer = regularizer
        self.recorder = Recorder(regularizer, folder, told or {})

    def start(self, step=None):
        self.step = step or 0
        self.recorder.start(None if step is None else self.state, step=self.step)
        return self

    def take_step(self):
        plan = self.regularizer.plan(ROWS, step=self.step)
        [planned] = plan.micro_batches
        batch = collate(planned.rows, pad_id=0)
        with self.regularizer.loss_of(planned, batch, plan):
            self.model(input_ids=batch.input_ids, use_cache=False).logits.backward()
        self.recorder.close(plan, lr=0.1, grad_norm=0.0)
        self.step += 1

    def save(self, folder=None):
        self.recorder.save(folder or self.state, step=self.step)

    def cut(self, steps=1):
        """Some steps, saved, whose run goes on later."""
        with self.recorder:
            for _ in range(steps):
                self.take_step()
            self.save()
            self.recorder.pause()


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["mine", "run"])
def test_saving_removes_nothing_of_others(tmp_path, place):
    loop = Loop(tmp_path / "run").start()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "mine" / "state.json").write_text("{}")
    with loop.recorder:
        loop.take_step()
        before = files_of(tmp_path)
        with pytest.raises(CheckpointError, match="into a folder of its own") as raised:
            loop.save(tmp_path / place)
        found = {"mine": "found model.safetensors:", "run": "found config.yaml, ledger.rank0.jsonl"}
        assert found[place] in str(raised.value)
        assert {**before, **files_of(tmp_path)} == files_of(tmp_path)


def test_its_own_folder_is_replaced_also_as_a_kill_leaves_it(tmp_path):
    loop = Loop(tmp_path).start()
    with loop.recorder:
        loop.state.mkdir(parents=True)
        for _ in range(2):
            loop.take_step()
            loop.save()
        (loop.state / "manifest.json").unlink()
        (loop.state / "risk3.safetensors").touch()
        (loop.state.parent / ".safereg.partial").mkdir()
        loop.save()
        assert sorted(path.name for path in loop.state.parent.rglob("*")) == [
            *("manifest.json", "safereg", "state.json")
        ]


def test_all_ranks_refuse_a_folder_of_others(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").touch()

    def work(ranks):
        loop = Loop(tmp_path / "run").start()
        with loop.recorder:
            loop.take_step()
            try:
                loop.save(tmp_path / "mine")
            except CheckpointError as error:
                return str(error)

    assert all("found model.safetensors" in said for said in on_ranks(2, work, tmp_path))
    assert (tmp_path / "mine" / "model.safetensors").exists()


def test_ranks_that_changed_are_in_the_ledger(tmp_path):
    def work(ranks):
        Loop(tmp_path / "run").start().cut(2)

    on_ranks(2, work, tmp_path)
    loop = Loop(tmp_path / "run").start(2)
    with loop.recorder:
        loop.take_step()
        loop.recorder.finish(3)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rank_changes"] == [{"step": 2, "before": 2, "now": 1}]
    assert verify_ledger(tmp_path / "run").rows == 2 * 2 * 2 + 1 + 2


def test_a_state_of_an_earlier_version_says_nothing_of_ranks_and_settings(tmp_path):
    Loop(tmp_path).start().cut()
    state = tmp_path / "state" / "safereg"
    known = json.loads((state / "state.json").read_text())
    for name in ("settings", "world_size", "format"):
        del known[name]
    (state / "state.json").write_text(json.dumps(known))
    (state / "manifest.json").unlink()
    loop = Loop(tmp_path, ceiling=0.5).start(1)
    with loop.recorder:
        loop.recorder.finish(1)
    assert json.loads((tmp_path / "summary.json").read_text())["rank_changes"] == []


def test_settings_that_changed_are_refused(tmp_path):
    Loop(tmp_path, ceiling=0.8).start().cut()
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"regularizer.ceiling was 0.8, is 0.5: resume with"):
        Loop(tmp_path, ceiling=0.5).start(1)
    assert (tmp_path / "config.yaml").read_text() == before
    loop = Loop(tmp_path, ceiling=0.8).start(1)
    with loop.recorder:
        loop.recorder.pause()


def test_its_folder_tells_the_settings_unless_the_loop_does(tmp_path):
    loop = Loop(tmp_path, told={"model": "m", "risk": {"estimator": "mine"}}, ceiling=0.8).start()
    with loop.recorder:
        loop.recorder.begin(4)
        loop.take_step()
        view = look_at(tmp_path, MetricsTail(tmp_path / "metrics.jsonl"))
        assert (view.state, view.step, view.total_steps) == ("running", 1, 4)
        loop.recorder.finish(1)
    (arm,) = read_arms([tmp_path], may_be_empty=set())
    assert method_of(arm) == "convex, step"
    assert risk_of(arm).startswith("mine")
    told = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert "reference" not in told
    assert (told["regularizer"]["ceiling"], told["train"]) == (0.8, {"steps": 4})


def test_a_stop_that_came_too_late_is_forgotten_and_said(tmp_path, capsys):
    loop = Loop(tmp_path).start()
    with loop.recorder:
        loop.take_step()
        assert safereg(["stop", str(tmp_path)]) == 0
        loop.take_step()
        assert loop.recorder.is_stop_requested
        ended = Timer(0.5, loop.recorder.finish, (2,))
        ended.start()
        assert safereg(["stop", str(tmp_path), "--wait", "--timeout", "20"]) == 0
        ended.join()
    assert not (tmp_path / "stop").exists()
    assert "of itself, before it saw the request; complete: see summary.json" in (
        capsys.readouterr().out
    )


def test_the_loop_of_the_page_stops_on_request(tmp_path, monkeypatch):
    """It saves, ends with 75, and what it saved is gone on from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "safety.yaml").write_text("risk: {estimator: column, max_held_back: 1}\n")
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    class Windows(list):
        def __iter__(self):
            yield self[0]
            assert safereg(["stop", "runs/loop"]) == 0
            yield self[1]

    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    [block] = [b for b in python_of(LOOPS.read_text()) if "Recorder(" in b]
    with pytest.raises(SystemExit) as end:
        exec(block, {**names, "windows": Windows([ROWS] * 3)})
    assert end.value.code == 75
    assert state_of(Path("runs/loop")) == (
        "stopped",
        "recorder.start(FOLDER, step=DONE) goes on from what recorder.save wrote",
    )
    again = Recorder(prepare(model, "safety.yaml"), Path("runs/loop"), {})
    again.start(Path("runs/loop/checkpoint/safereg"), step=2)
    with again:
        again.finish(2)
    assert verify_ledger("runs/loop").rows == 4
