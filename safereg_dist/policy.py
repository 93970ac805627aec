"""Stage 2: the policy's trunk, giving the hidden states that predict response tokens."""

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from safereg_dist.errors import ConfigError
from safereg_dist.models.architecture import decoder_layers
from safereg_dist.regions import POLICY_FORWARD, region
from safereg_dist.types import Head, MicroBatch, head_of

_UNSUPPORTED_HEADS = ("logits_soft_cap",)


class PolicyStates(NamedTuple):
    """What the policy's trunk gives for one micro-batch."""

    hidden: Tensor
    """[T, H] states that predict the response tokens; the head takes these."""
    probed: Tensor | None
    """[B, S, H] detached output of the probed decoder layer, where one is asked for."""


class Policy(nn.Module):
    """A causal language model split into trunk and head, so that no logits of a batch are made."""

    def __init__(self, model: PreTrainedModel, *, probed_layer: int | None = None) -> None:
        super().__init__()
        self.model = model
        check_head(model)
        self._probed: Tensor | None = None
        self._probes_last = False
        if probed_layer is not None:
            _, layers = decoder_layers(model)
            if not 1 <= probed_layer <= len(layers):
                raise ConfigError(
                    f"the probe reads layer {probed_layer}, the policy has layers 1 to "
                    f"{len(layers)}: fit a probe for this model"
                )
            self._probes_last = probed_layer == len(layers)
            if not self._probes_last:
                # The layer itself, not a module inside it: activation checkpointing runs what is
                # inside a second time in the backward pass, and a hook there would fire twice.
                layers[probed_layer - 1].register_forward_hook(self._keep_probed)

    @region(POLICY_FORWARD)
    def forward(self, batch: MicroBatch) -> PolicyStates:
        """States of one micro-batch; the trunk runs once over all rows."""
        # Rows are padded on the right, so under a causal mask no real token sees padding. A mask of
        # its own would keep attention off its fastest kernel, and be looked at by the host.
        last = self.model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = last.reshape(-1, last.shape[-1]).index_select(0, batch.response_index)
        probed = last.detach() if self._probes_last else self._probed
        self._probed = None
        return PolicyStates(hidden, probed)

    @property
    def head(self) -> Head:
        """The language-model head; whole inside the engine's forward only."""
        return head_of(self.model)

    def _keep_probed(self, module: nn.Module, args: object, output: object) -> None:
        states = output[0] if isinstance(output, tuple) else output
        assert isinstance(states, Tensor)
        self._probed = states.detach()


def check_head(model: PreTrainedModel) -> None:
    """Raises ConfigError where logits are more than `types.Head` says."""
    config = model.config.get_text_config()
    for name in _UNSUPPORTED_HEADS:
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            raise ConfigError(
                f"{type(model).__name__} changes its logits ({name}={value}) in a way that the "
                "fused head does not know"
            )
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} has a head of type "
            f"{type(model.get_output_embeddings()).__name__}, expected nn.Linear"
        )


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recomputes decoder layers in the backward pass instead of keeping their activations."""
    # Renamed in transformers 5.23; the old name goes once the lower bound has passed it.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
