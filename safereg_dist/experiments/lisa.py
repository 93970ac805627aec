"""Lisa (arXiv 2405.18641), a rival: turns of safety rows and of the user's, held near their start.

    L_k(w) + rho/2 |w - w'|^2     w' = the weights at the last change of turns, first those before
                                  training; L_k the cross-entropy on the rows whose turn it is

A cycle is K1 optimizer steps on safety rows, then K2 on the user's. The weights are those that the
model computes with, all of them or its adapters; in bfloat16 the distance is that of the rounded
ones. The authors' script (git-disl/Lisa) leaves the proximal term out of the first tenth of the
steps; here it is there from the first.
"""

from dataclasses import replace as with_fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safereg_dist.config import LisaConfig, replace
from safereg_dist.data import Sampler
from safereg_dist.errors import CheckpointError
from safereg_dist.factory import Run
from safereg_dist.factory.inputs import build_sources
from safereg_dist.parallel.engine import PolicyEngine, Update
from safereg_dist.types import Row

_STATE_FILE = "lisa.safetensors"


def in_turns(run: Run) -> Run:
    """The run with rows in turns and the proximal term, where `lisa` is configured; else itself.

    Raises:
        ConfigError, DataError: the safety rows cannot be read.
    """
    settings = run.config.lisa
    if settings is None:
        return run
    data = replace(run.config.data, train=settings.safety, validation=None)
    safety = build_sources(replace(run.config, data=data, eval=None), run.tokenizer, run.ranks)
    task = run.sources
    turns = Turns(safety.stream, task.stream, settings, rows_per_step=task.rows_per_step)
    return with_fields(
        run,
        sources=with_fields(task, stream=turns),
        engine=ProximalEngine(run.engine, run.model, settings),
    )


class TurnAt(NamedTuple):
    """Whose turn an optimizer step is in, and its number among the steps of that kind."""

    is_safety: bool
    step: int
    is_last: bool
    """The turn ends with this step."""


def turn_at(step: int, settings: LisaConfig) -> TurnAt:
    """The turn of an optimizer step: K1 on safety rows, K2 on the user's, and again."""
    first, second = settings.safety_steps, settings.task_steps
    cycle, place = divmod(step, first + second)
    if place < first:
        return TurnAt(True, cycle * first + place, place == first - 1)
    place -= first
    return TurnAt(False, cycle * second + place, place == second - 1)


class Turns:
    """The rows of a run in turns: like a `data.Sampler`, its position determines the row."""

    def __init__(
        self, safety: Sampler, task: Sampler, settings: LisaConfig, *, rows_per_step: int
    ) -> None:
        self._safety, self._task = safety, task
        self._settings, self._rows_per_step = settings, rows_per_step

    def row(self, position: int) -> Row | None:
        """The row at a position of the stream."""
        step, place = divmod(position, self._rows_per_step)
        turn = turn_at(step, self._settings)
        stream = self._safety if turn.is_safety else self._task
        return stream.row(turn.step * self._rows_per_step + place)

    def in_first_epoch(self, position: int) -> bool:
        """True always: it is asked for the cost of risk alone, and there is none."""
        return True


class ProximalEngine:
    """A `PolicyEngine` whose loss has rho/2 |w - w'|^2 beside it; w' moves as turns change."""

    def __init__(self, engine: PolicyEngine, model: nn.Module, settings: LisaConfig) -> None:
        self.run = engine.run
        self._engine, self._settings = engine, settings
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._step = 0
        self._begun = self._copied()

    def _copied(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._weights]

    def __call__(self, input_ids: Tensor, **positions: Tensor) -> Tensor:
        """Forward of one micro-batch."""
        return self._engine(input_ids, **positions)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`, and with the step's last micro-batch rho (w - w')."""
        if is_last:
            pairs = zip(self._weights, self._begun, strict=True)
            far = sum((w.float() - begun.float()).square().sum() for w, begun in pairs)
            loss = loss + self._settings.rho / 2 * far
        self._engine.backward(loss, is_last=is_last)

    def update(self, lr: float) -> Update:
        """The engine's step; at the end of a turn w' becomes the weights after it."""
        done = self._engine.update(lr)
        if turn_at(self._step, self._settings).is_last:
            self._begun = self._copied()
        self._step += 1
        return done

    def save(self, folder: Path) -> None:
        """The engine's state, w' and the number of steps."""
        self._engine.save(folder)
        state = {f"{i:05d}": weight.contiguous() for i, weight in enumerate(self._begun)}
        save_file({**state, "step": torch.tensor(self._step)}, folder / _STATE_FILE)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            CheckpointError: the file is missing.
        """
        self._engine.load(folder)
        path = folder / _STATE_FILE
        if not path.is_file():
            raise CheckpointError(f"expected {_STATE_FILE} in {folder}, found none")
        state = load_file(path, device=str(self._begun[0].device))
        self._step = int(state.pop("step"))
        self._begun = [state[name] for name in sorted(state)]
