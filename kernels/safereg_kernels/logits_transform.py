"""Scales and soft caps of logits, as configurations of Hugging Face models name them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
_DIVISOR = "logits_scaling"  # Granite
_SOFTCAP = "final_logit_softcapping"  # Gemma 2


class LogitsTransform(NamedTuple):
    """What a model makes of its head's output: x = softcap tanh(scale raw / softcap)."""

    scale: float
    softcap: float | None

    def __call__(self, raw: Tensor) -> Tensor:
        x = raw * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


def logits_transform_of(model: nn.Module) -> LogitsTransform:
    """What the configuration of a Hugging Face causal LM says of its logits."""
    config = _text_config(model)
    scale = 1.0
    for name in (*_FACTORS, _DIVISOR):
        value = getattr(config, name, None)
        if value is not None:
            scale *= 1 / value if name == _DIVISOR else value
    softcap = getattr(config, _SOFTCAP, None)
    return LogitsTransform(scale=float(scale), softcap=float(softcap) if softcap else None)


@contextmanager
def without_logits_transform(model: nn.Module) -> Iterator[None]:
    """A block in which the model hands on what its head returns, without scale and soft cap."""
    neutral = {**dict.fromkeys((*_FACTORS, _DIVISOR), 1.0), _SOFTCAP: None}
    before: list[tuple[Any, str, Any]] = []
    # Some models read their configuration in each forward, others keep the number themselves.
    for holder in (_text_config(model), model, getattr(model, "base_model", None)):
        for name, value in neutral.items():
            own = vars(holder).get(name) if holder is not None else None
            if isinstance(own, int | float):
                before.append((holder, name, own))
                setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, name, own in reversed(before):
            setattr(holder, name, own)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return config if get_text_config is None else get_text_config()
