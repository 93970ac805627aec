"""DeepSpeed's configuration, built from scratch for each engine and never copied between them.

A reference that inherits an optimizer block gets a whole optimizer.
"""

from typing import TYPE_CHECKING, Any

from safereg_dist.config import Config

if TYPE_CHECKING:  # the planner reads the numbers below without loading torch
    from torch import nn
    from transformers import PreTrainedModel

MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default limit on gathered parameters; beyond it nothing is prefetched."""
MAX_REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed's own: parameters between two uses of one up to which it stays whole in between."""


def persistence_threshold(hidden_size: int) -> int:
    """Elements up to which a parameter is never let go."""
    return 10 * hidden_size


def prefetched_elements(hidden_size: int) -> int:
    """Elements that are gathered ahead of their use."""
    return int(0.9 * hidden_size * hidden_size)


def zero_config(
    *,
    precision: str,
    offload: str,
    rows: int,
    hidden_size: int | None,
    hpz_partition_size: int = 1,
) -> dict[str, Any]:
    """ZeRO-3 without an optimizer: for building a model sharded, and for the reference.

    The reference never has hpZ: deepspeed 0.19 refuses a second model that asks for its group
    (deepspeedai/DeepSpeed#4901), and without a backward pass it would save no gather.
    """
    zero: dict[str, Any] = {"stage": 3, "zero_hpz_partition_size": hpz_partition_size}
    if offload == "cpu":
        zero["offload_param"] = _on_host()
    if hidden_size is not None:
        zero["stage3_param_persistence_threshold"] = persistence_threshold(hidden_size)
        zero["stage3_prefetch_bucket_size"] = prefetched_elements(hidden_size)
    return {
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
    }


def _on_host() -> dict[str, Any]:
    import torch

    return {"device": "cpu", "pin_memory": torch.cuda.is_available()}


def policy_config(model: "PreTrainedModel", config: Config) -> dict[str, Any]:
    """ZeRO with an optimizer: for the trained model."""
    from safereg_dist.types import head_of

    hidden_size = hidden_size_of(model)
    ds = zero_config(
        precision=config.train.precision,
        offload=config.engine.offload_params,
        rows=config.train.micro_batch_size,
        hidden_size=hidden_size,
        hpz_partition_size=config.engine.hpz_partition_size,
    )
    zero = ds["zero_optimization"]
    zero["reduce_bucket_size"] = max(hidden_size * hidden_size, 1)
    # The head of a model of 70B and more exceeds the bound alone.
    head = sum(getattr(p, "ds_numel", p.numel()) for p in head_of(model).parameters)
    zero["stage3_max_live_parameters"] = MAX_LIVE_PARAMETERS + head
    if config.engine.is_replicated:
        ds["zero_optimization"] = zero = {
            "stage": config.engine.zero_stage,
            "reduce_bucket_size": zero["reduce_bucket_size"],
        }
    if config.engine.offload_optimizer == "cpu":
        zero["offload_optimizer"] = _on_host()
    ds["gradient_accumulation_steps"] = config.train.grad_accum_steps
    ds["gradient_clipping"] = config.optimizer.max_grad_norm
    ds["zero_allow_untested_optimizer"] = True  # torch's AdamW, which DeepSpeed does not list
    ds["zero_force_ds_cpu_optimizer"] = False
    # Its default synchronises the device before every forward, to print the throughput.
    ds["timers"] = {"throughput": {"enabled": False}}
    return ds


def hidden_size_of(module: "nn.Module") -> int:
    """The hidden size of the model; bucket sizes and thresholds are computed from it."""
    from transformers import PreTrainedModel

    config = next(m.config for m in module.modules() if isinstance(m, PreTrainedModel))
    return int(config.get_text_config().hidden_size)
