"""The interfaces that every backend implements."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from safereg_dist.config import Config
from safereg_dist.models.adapters import AdapterValues
from safereg_dist.parallel.comm import Ranks
from safereg_dist.types import Head

Adapt = Callable[[PreTrainedModel], AdapterValues]


class Update(NamedTuple):
    """The outcome of an optimizer step."""

    applied: bool
    """False where a gradient was not finite on some rank, and no rank stepped."""
    grad_norm: float
    """Global L2 norm before clipping; inf or nan where not applied."""


class PolicyEngine(Protocol):
    """Runs, differentiates, steps, saves and restores the trained module."""

    def run(self, **inputs: Any) -> Any:
        """The model's output for its keyword arguments, under the engine's hooks."""
        ...

    def __call__(self, input_ids: Tensor, **positions: Tensor) -> Tensor:
        """The output of the model's head for [B, S] tokens, under the engine's hooks: its logits.

        `position_ids` [B, S] are given too where rows are packed (`MicroBatch.inputs`).
        Inside `SafetyRegularizer.loss_of` it is the loss, a float32 scalar. What routers of a
        mixture of experts add to their loss is not in it: there is no mask that tells padding.
        """
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`, summed (not averaged) over ranks and micro-batches."""
        ...

    def update(self, lr: float) -> Update:
        """Clips, steps at learning rate `lr` and clears gradients."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights, optimizer state and step counters below `folder`; all ranks call it.

        All ranks may give one folder, or each its own: a rank writes files of names of its own, and
        the rest rank 0.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote; all ranks call it."""
        ...


class ReferenceEngine(Protocol):
    """Runs the frozen trunk; every rank calls it the same number of times.

    Rows are padded on the right: no real token attends to padding, so no mask is needed.
    """

    def __call__(self, input_ids: Tensor) -> Tensor:
        """[B, S, H] last hidden states of [B, S] tokens, without gradient."""
        ...

    def prefix(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] hidden states after the first `num_layers` decoder layers; runs no others."""
        ...


class Backend(Protocol):
    """A way to shard models: makes engines, loads models, gathers weights."""

    ranks: Ranks

    def load_model(
        self,
        folder: Path,
        *,
        precision: str,
        offload: str,
        hpz_partition_size: int = 1,
        quantize: str = "none",
        adapt: Adapt | None = None,
    ) -> PreTrainedModel:
        """A causal language model whose weights come from a local Hugging Face folder.

        `hpz_partition_size` ranks share a second shard of it; 1 = none. `adapt` puts adapters into
        the model and returns their first values. `quantize` is how the frozen weights are kept; the
        configuration lets it through where they are whole (`lora.quantize`).
        """
        ...

    def load_head(self, folder: Path, *, precision: str) -> Head:
        """The frozen head alone of the model in a folder; whole as `gathered` yields it only."""
        ...

    def wrap_policy(self, model: PreTrainedModel, *, config: Config) -> PolicyEngine:
        """An engine that trains `model`."""
        ...

    def wrap_reference(self, trunk: nn.Module, *, offload: str, rows: int) -> ReferenceEngine:
        """An engine that runs the frozen `trunk` on the same process groups as the policy."""
        ...

    def gathered(
        self, parameters: Iterable[nn.Parameter]
    ) -> AbstractContextManager[Sequence[nn.Parameter]]:
        """A block with these parameters whole on every rank, in order (collective).

        They are the given ones, or copies that belong to the block: read them, do not train them.
        """
        ...

    def first_not_finite(self, model: nn.Module) -> str | None:
        """Name of a parameter with a non-finite value on this rank, or None."""
        ...

    def fingerprint(self, model: nn.Module, adapters: Sequence[str] = ()) -> str:
        """Fingerprint of the weights, equal for any number of ranks (collective).

        Of a model with adapters it is that of the base model, and of it with those named.
        """
        ...
