"""What a checkpoint is made of, small: an engine, a regulariser and a state without a model."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from safereg_dist.coefficient import Coefficient
from safereg_dist.config import RegularizerConfig
from safereg_dist.run.checkpoint import RunState, config_hash
from support.ranks import ALONE


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

    def __init__(self, ema=None, others=0):
        self.others = others
        config = RegularizerConfig(granularity="batch", ema=0.5)
        self.policy = SimpleNamespace(model=torch.nn.Identity())
        self.coefficient = Coefficient(config, threshold=None, ranks=ALONE)
        self.coefficient.load_state_dict({"ema": ema})
        self.risk = ema

    def save_state(self, path):
        """Writes the risk, returns the average."""
        path.write_text(str(self.risk))
        if self.others:
            path.with_name("risk1.safetensors").write_text("5")
        return self.coefficient.state_dict()

    def load_state(self, path, state):
        """Reads both."""
        self.coefficient.load_state_dict(state)
        paths = [path] if isinstance(path, Path) else path
        self.risk = sum(float(each.read_text()) for each in paths)


def state(config, step, **changes):
    """The state of a run of one rank after so many steps."""
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
