"""Seconds of a step that offloading costs."""

from safereg_dist.parallel.hardware import HOST_LINK_BYTES_PER_S, HOST_MEMORY_BYTES_PER_S
from safereg_dist.plan.gathers import padded, policy_gathers
from safereg_dist.plan.memory import trained_shard
from safereg_dist.plan.risky_rows import expected_rows
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape
from safereg_dist.plan.traffic import group_batches

UPDATE_BYTES = 30
"""Of the host's memory a parameter in AdamW: gradient, master weight and two moments read (16), the
last three written (12), the weight in bf16 (2)."""


def offload_seconds(shape: ModelShape, settings: Settings) -> float:
    """Seconds in which a GPU waits for its host, an estimate without any overlap; else 0.

    Over PCIe come a rank's shard for every gather of an offloaded model, and go the gradients of
    every micro-batch and, back, the updated weights of an offloaded optimizer, which runs on the
    host: its memory serves all GPUs of the node.
    """
    shard, batches = trained_shard(shape, settings), settings.grad_accum
    moved = 0.0
    if settings.offload_params == "cpu":
        gathers = policy_gathers(shape, settings)
        moved += (gathers.first + gathers.again) / settings.data_parallel * batches + shard
    is_apart = settings.arm in ("routed", "always_on") and not settings.has_adapters_off
    if settings.offload_reference == "cpu" and is_apart:
        trunk = sum(padded(module.numels, shape, settings.data_parallel) for module in shape.trunk)
        expected = expected_rows(settings, group_batches=group_batches(shape, settings))
        passes = expected.passes if settings.arm == "routed" else batches
        moved += trunk / settings.data_parallel * passes
    seconds = 0.0
    if settings.offload_optimizer == "cpu":
        moved += shard * (batches + 1)
        ranks = min(settings.world_size, settings.gpus_per_node)
        seconds = shard * UPDATE_BYTES * ranks / HOST_MEMORY_BYTES_PER_S
    return seconds + moved * settings.itemsize / HOST_LINK_BYTES_PER_S
