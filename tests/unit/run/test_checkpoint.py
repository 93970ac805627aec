"""Claimed: checkpoints are whole or not there, the newest are kept, and what is of another run is
refused. Exact. A whole run's resume, to the bit: tests/distributed/test_resume.py.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.ranks import ALONE

from safereg_dist.coefficient import Coefficient
from safereg_dist.config import RegularizerConfig, load_config
from safereg_dist.errors import CheckpointError
from safereg_dist.run.checkpoint import (
    RunState,
    began_with,
    complete_checkpoints,
    config_hash,
    differences,
    load_checkpoint,
    remove_partial,
    save_checkpoint,
)


class Engine:
    """An engine whose state is one number."""

    def __init__(self, number=0):
        self.number = number

    def save(self, folder):
        """Writes it."""
        folder.mkdir(parents=True)
        (folder / "number").write_text(str(self.number))

    def load(self, folder):
        """Reads it."""
        self.number = int((folder / "number").read_text())


class Regularizer:
    """A regulariser around a policy without weights: a moving average, and a risk of one number."""

    def __init__(self, ema=None):
        config = RegularizerConfig(granularity="batch", ema=0.5)
        self.policy = SimpleNamespace(model=torch.nn.Identity())
        self.coefficient = Coefficient(config, threshold=None, ranks=ALONE)
        self.coefficient.load_state_dict({"ema": ema})
        self.risk = ema

    def save_state(self, path):
        """Writes the risk, returns the average."""
        path.write_text(str(self.risk))
        return self.coefficient.state_dict()

    def load_state(self, path, state):
        """Reads both."""
        self.coefficient.load_state_dict(state)
        paths = [path] if isinstance(path, Path) else path
        self.risk = sum(float(each.read_text()) for each in paths)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata: {train: t.jsonl}\nrisk: {estimator: column}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    return lambda *changes: load_config(path, list(changes))


def state(config, step, **changes):
    values = RunState(
        step=step,
        world_size=1,
        config_hash=config_hash(config),
        order_digest="rows",
        non_finite_steps=0,
        non_finite_in_a_row=0,
        metrics_bytes=0,
        ledger_bytes=[0],
        seconds=1.0,
    )
    return replace(values, **changes)


def save(folder, run_state, engine):
    regularizer = Regularizer(run_state.step / 8)
    save_checkpoint(folder, run_state, engine=engine, regularizer=regularizer, ranks=ALONE, keep=2)


def load(path, config, regularizer, *, order_digest="rows"):
    engine = Engine()
    found = load_checkpoint(
        path,
        config=config,
        engine=engine,
        regularizer=regularizer,
        ranks=ALONE,
        order_digest=order_digest,
    )
    return found, engine


def draws():
    return [random.random(), float(torch.rand(1)), float(np.random.rand())]


def test_the_newest_are_kept_and_random_states_come_back(config, tmp_path):
    folder = tmp_path / "checkpoint"
    random.seed(1), torch.manual_seed(2), np.random.seed(3)
    for number in (1, 2, 10, 11):
        save(folder, state(config(), number), Engine(number))
    expected = draws()
    kept = complete_checkpoints(folder)
    assert [path.name for path in kept] == ["step-00000010", "step-00000011"]
    random.seed(7), torch.manual_seed(7), np.random.seed(7)
    regularizer = Regularizer()
    found, engine = load(kept[-1], config(), regularizer)
    assert draws() == expected
    assert (found.step, engine.number) == (11, 11)
    assert regularizer.coefficient.state_dict() == found.regularizer == {"ema": 11 / 8}
    assert regularizer.risk == 11 / 8


def test_only_whole_checkpoints_count(config, tmp_path):
    save(tmp_path, state(config(), 3), Engine())
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / ".step-00000010.partial").mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003"]
    remove_partial(tmp_path)
    assert not (tmp_path / ".step-00000010.partial").exists()
    assert (tmp_path / "step-00000003" / "state.json").is_file()


def test_what_is_of_another_run_is_refused(config, tmp_path):
    save(tmp_path, state(config(), 1), Engine())
    (first,) = complete_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="another configuration"):
        load(first, config("train.seed=5"), Regularizer())
    with pytest.raises(CheckpointError, match="dealt as risky"):
        load(first, config(), Regularizer(), order_digest="other rows")


def test_another_number_of_ranks_has_all_risks_and_draws_anew(config, tmp_path):
    """What it draws follows from the seed, the step and the rank; not from what drew before."""
    assert began_with(tmp_path, ALONE) == 1
    for step in (3, 4):
        save(tmp_path, state(config(), step, world_size=2, began_with=4), Engine())
        (tmp_path / f"step-{step:08d}" / "risk1.safetensors").write_text("5")
    assert began_with(tmp_path, ALONE) == 4
    third, fourth = complete_checkpoints(tmp_path)
    drawn = []
    for path, *changes in ((third,), (third,), (fourth,), (fourth, "train.seed=5")):
        regularizer, own = Regularizer(), config(*changes)
        values = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(values | {"config_hash": config_hash(own)}))
        load(path, own, regularizer)
        drawn.append(draws())
        assert regularizer.risk == values["step"] / 8 + 5
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) == 3


@pytest.mark.parametrize("written", [1, 3, None])
def test_another_format_is_refused(config, tmp_path, written):
    """The first version of the format did not say which it was."""
    save(tmp_path, state(config(), 3), Engine())
    (path,) = complete_checkpoints(tmp_path)
    values = json.loads((path / "state.json").read_text())
    values["format"] = written
    kept = {name: value for name, value in values.items() if value is not None}
    (path / "state.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match=rf"has format {written or 1}, .* reads 2"):
        load(path, config(), Regularizer())


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 2}', '{"format": 2, "more": 1}'])
def test_a_state_that_cannot_be_read_is_refused(config, tmp_path, content):
    save(tmp_path, state(config(), 3), Engine())
    (path,) = complete_checkpoints(tmp_path)
    (path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="remove this checkpoint"):
        load(path, config(), Regularizer())


def test_places_and_patience_do_not_change_a_run(config):
    for change in (
        *("output_dir=elsewhere", "train.save_every=3", "risk.critic.timeout_s=77"),
        *("risk.critic.endpoint=http://127.0.0.1:9/v1", "engine.timeout_s=99", "profile=true"),
    ):
        assert config_hash(config(change)) == config_hash(config()), change
    assert config_hash(config("optimizer.lr=0.5")) != config_hash(config())
    assert differences(config(), config("optimizer.lr=0.5", "output_dir=elsewhere")) == [
        f"optimizer.lr was {config().optimizer.lr}, is 0.5"
    ]
