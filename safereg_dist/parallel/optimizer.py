"""Parameter groups and the learning rate as a pure function of the step."""

import math

from torch import nn

from safereg_dist.config import OptimizerConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer: matrices decay, norms and biases do not.

    Works on sharded parameters too, whose own shape is empty.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` in 0..total_steps-1.

    Linear warm-up over the first `warmup_ratio` of the steps (the first step is already above 0),
    then cosine or linear decay to `min_lr_ratio * lr`, or constant.
    """
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    decay = (
        0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    )
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * decay)
