"""What tests put before the policy's engine, to see or to change what passes."""

from torch import Tensor

from safereg_dist.parallel.engine import PolicyEngine, Update


class PassThrough:
    """A policy's engine that hands everything on; a test overrides what it is about."""

    def __init__(self, engine: PolicyEngine) -> None:
        self._engine = engine

    def __call__(self, input_ids: Tensor, **positions: Tensor) -> Tensor:
        """The engine's."""
        return self._engine(input_ids, **positions)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """The engine's."""
        self._engine.backward(loss, is_last=is_last)

    def update(self, lr: float) -> Update:
        """The engine's."""
        return self._engine.update(lr)
