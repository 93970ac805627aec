"""Where the modules of a Hugging Face causal language model are."""

from torch import nn
from transformers import PreTrainedModel

from safereg_dist.errors import ConfigError


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name in the base model, and list, of the decoder layers of a causal language model.

    Raises:
        ConfigError: the base model has no list of `num_hidden_layers` modules.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.base_model.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ConfigError(
        f"{type(model).__name__} has no list of {count} decoder layers in its base model: this "
        "architecture is not supported"
    )


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recomputes decoder layers in the backward pass instead of keeping their activations."""
    # Renamed in transformers 5.23; the old name goes once the lower bound has passed it.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
