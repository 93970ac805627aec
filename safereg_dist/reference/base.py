"""What a reference is to the step: the model that is run, and how rows share its passes."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from safereg_dist.types import Head


class ReferenceModel(Protocol):
    """What a frozen model is to the step, whatever runs it: the seam for other references.

    Here: `parallel` engines of its own (`EngineModel`). Every rank makes every call.
    """

    @property
    def head(self) -> Head:
        """The head as it lies on this rank, perhaps sharded: its shape and kind."""
        ...

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """[B, S, H_ref] last hidden states after the final norm, without gradient."""
        ...

    def prefix_states(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after the first `num_layers` decoder layers, which alone run."""
        ...

    def gathered_head(self) -> AbstractContextManager[Head]:
        """A block in which the head is whole."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How rows share the passes of the reference, and how much is kept of them."""

    rows_per_pass: int
    """Rows of one forward."""
    keep_bytes: int = 256 << 20
    """Bytes of hidden states that may wait for their micro-batch, if more than one has to."""
    max_length: int = 1024
    """Longest row, in tokens."""
