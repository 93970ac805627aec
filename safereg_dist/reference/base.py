"""The interface of a reference model, and how rows are packed into its passes."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from safereg_dist.config.sections import KEEP_BYTES
from safereg_dist.types import Head


class ReferenceModel(Protocol):
    """The interface that the step needs of a frozen model; implement it for other references.

    `EngineModel` implements it with a `parallel` engine. Every rank makes every call.
    """

    @property
    def head(self) -> Head:
        """The head, possibly sharded on this rank; read for its sizes and dtype."""
        ...

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """[B, S, H_ref] last hidden states after the final norm, without gradient."""
        ...

    def prefix_states(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] states after the first `num_layers` decoder layers; runs no further layer."""
        ...

    def gathered_head(self) -> AbstractContextManager[Head]:
        """A block in which the head is whole."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How rows are packed into passes of the reference, and how many states are kept."""

    rows_per_pass: int
    """Rows of one forward."""
    keep_bytes: int = KEEP_BYTES
    """Bytes of hidden states kept for later micro-batches; those of one are always kept."""
    max_length: int = 1024
    """Longest row, in tokens."""
