"""An engine that lets somebody look between the last backward of a step and its update."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from safereg_dist.parallel.engine import PolicyEngine, Update


class WatchedEngine:
    """A `PolicyEngine` that calls `look` before each update, while gradients are still there."""

    def __init__(self, engine: PolicyEngine, look: Callable[[], None]) -> None:
        self._engine = engine
        self._look = look
        self.save: Callable[[Path], None] = engine.save
        self.load: Callable[[Path], None] = engine.load
        self.backward = engine.backward

    def __call__(self, input_ids: Tensor) -> Tensor:
        """What the engine gives."""
        return self._engine(input_ids)

    def update(self, lr: float) -> Update:
        """The engine's update, after a look."""
        self._look()
        return self._engine.update(lr)
