"""The policy: the user's own model, whose head can compute a loss in its own call.

Engines gather a module's weights, and reduce their gradients, around the module's forward. So the
loss is computed inside the call of the head itself, with hidden states in and a scalar out: no
wrapper module is needed, every engine's hooks work as they do for logits, no logits of a batch are
ever made, and `save_pretrained` sees the user's model as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safereg_dist.errors import ConfigError
from safereg_dist.models.architecture import decoder_layers
from safereg_dist.types import Head, head_of
from safereg_kernels.logits_transform import logits_transform_of, without_logits_transform

LossOfStates = Callable[[Tensor, Tensor | None], Tensor]
"""Maps the head's input [B, S, H] and the probed layer's output to a scalar."""


class Policy:
    """A causal language model that can return a loss in place of its logits."""

    def __init__(self, model: PreTrainedModel, *, probed_layer: int | None = None) -> None:
        """`probed_layer`, counted from 1, is the decoder layer that a probe reads.

        Raises:
            ConfigError: a head that is not a linear layer, or a layer that the model does not have.
        """
        check_head(model)
        self.model = model
        self._transform = logits_transform_of(model)  # neutral while a loss is computed
        self._loss: LossOfStates | None = None
        self._probes_last = False
        self._probed: Tensor | None = None
        for head in head_layers(model):
            # On the instance: the engine's hooks stand around `forward`, the class stays as it is.
            plain = partial(self._head_forward, head.forward)
            # Each step brings another loss: compiled, it would be compiled again.
            head.forward = torch.compiler.disable(plain)
        if probed_layer is not None:
            self._watch_layer(probed_layer)

    def _watch_layer(self, number: int) -> None:
        _, layers = decoder_layers(self.model)
        if not 1 <= number <= len(layers):
            raise ConfigError(
                f"the probe reads layer {number}, the policy has layers 1 to {len(layers)}: fit a "
                "probe for this model"
            )
        self._probes_last = number == len(layers)
        if not self._probes_last:
            # The layer itself, not a module inside it: activation checkpointing runs what is
            # inside a second time in the backward pass, and a hook there would fire twice.
            layers[number - 1].register_forward_hook(self._keep_probed)

    @contextmanager
    def ending_in(self, loss: LossOfStates) -> Iterator[None]:
        """A block in which a forward of the model returns `loss(hidden, probed)` as its logits."""
        with without_logits_transform(self.model):  # it would scale the loss as if it were logits
            self._loss = loss
            try:
                yield
            finally:
                self._loss = self._probed = None

    @property
    def head(self) -> Head:
        """The language-model head; its weights are gathered only inside its own call."""
        scale, softcap = self._transform
        return head_of(self.model)._replace(scale=scale, softcap=softcap)

    def _head_forward(self, plain: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        if self._loss is None:
            return plain(hidden)
        return self._loss(hidden, hidden.detach() if self._probes_last else self._probed)

    def _keep_probed(self, module: nn.Module, args: object, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        assert isinstance(states, Tensor)
        self._probed = states.detach()


def check_head(model: PreTrainedModel) -> None:
    """Raises ConfigError if the head computes anything that `types.Head` cannot express."""
    cap = getattr(model.config.get_text_config(), "logits_soft_cap", None)
    if cap is not None:
        raise ConfigError(
            f"{type(model).__name__} changes its logits (logits_soft_cap={cap}) in a way that the "
            "fused head does not know"
        )
    for head in head_layers(model):
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"{type(model).__name__} has a head of type {type(head).__name__}, expected "
                "nn.Linear: take the head out of LoRA's target_modules (modules_to_save trains it "
                "whole)"
            )


def head_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The head; of a head in `modules_to_save` (PEFT) the original and every trained copy."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    if not hasattr(head, "original_module"):
        return [head]
    return [head.original_module, *head.modules_to_save.values()]  # type: ignore[operator, union-attr]
