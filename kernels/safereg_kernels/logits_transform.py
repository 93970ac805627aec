"""Scales and soft caps of logits, as configurations of Hugging Face models name them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class LogitsTransform(NamedTuple):
    """What a model makes of its head's output: x = softcap tanh(scale raw / softcap)."""

    scale: float
    softcap: float | None

    def __call__(self, raw: Tensor) -> Tensor:
        x = raw * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


def logits_transform_of(model: nn.Module) -> LogitsTransform:
    """What the configuration of a Hugging Face causal LM says of its logits."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    if get_text_config is not None:
        config = get_text_config()
    scale = 1.0
    for name, is_divisor in (
        ("logit_scale", False),  # Cohere
        ("lm_head_multiplier", False),  # Falcon-H1
        ("logits_scaling", True),  # Granite
    ):
        value = getattr(config, name, None)
        if value is not None:
            scale *= 1 / value if is_divisor else value
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitsTransform(scale=float(scale), softcap=float(softcap) if softcap else None)
