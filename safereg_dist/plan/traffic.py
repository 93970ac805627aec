"""Bytes that one rank receives in an optimizer step, by item and by kind of link.

Counted is what comes from other ranks (as much goes out): of an all-gather of S bytes over g ranks,
or a reduce-scatter of S bytes, S (g - 1) / g; of an all-reduce twice that. Over several nodes a
ring passes every byte from GPU to GPU, and one in `gpus_per_node` of these hops leaves the node.
"""

from dataclasses import dataclass

from safereg_dist.plan.adapters import adapter_numels, trained_numels
from safereg_dist.plan.gathers import padded, policy_gathers, staying, threshold
from safereg_dist.plan.risky_rows import expected_rows
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape
from safereg_dist.reference.reference import micro_batches_at_once

AGREEMENT_BYTES = {"sft": 0, "routed": 8, "stored": 16, "always_on": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that one rank receives."""

    inside: float
    """Over the links of a node."""
    between: float
    """Over its share of the node's network."""

    @property
    def total(self) -> float:
        """Both together."""
        return self.inside + self.between


def traffic(shape: ModelShape, settings: Settings) -> dict[str, Traffic]:
    """Bytes of one optimizer step, by item; the safety path is `reference ...`, `agreement`."""
    return {**_policy(shape, settings), **_safety(shape, settings)}


def group_batches(shape: ModelShape, settings: Settings) -> int:
    """Micro-batches whose reference states are kept together; as `reference` counts."""
    row = settings.seq_length * shape.hidden_size * settings.itemsize
    return micro_batches_at_once(settings.keep_bytes, settings.micro_batch * row)


def _policy(shape: ModelShape, settings: Settings) -> dict[str, Traffic]:
    """ZeRO-3: gathers and one reduction in each micro-batch; small parameters once, updated."""
    world, batches = settings.data_parallel, settings.grad_accum
    gathers = policy_gathers(shape, settings)
    trained = sum(-(-n // world) * world for n in trained_numels(shape, settings))
    adapters = adapter_numels(shape, settings)
    small = staying(shape.modules, shape) + sum(n for n in adapters if n <= threshold(shape))
    gathered = padded(adapters, shape, world)
    # hpZ: a parameter is gathered over all ranks once a step, then over the second shards' groups.
    from_all = 1 if settings.hpz > 1 else batches
    again = gathers.again * batches + gathers.first * (batches - from_all)
    if settings.lora_rank and settings.activation_checkpointing and gathers.again:
        # With adapters the recomputation and the backward pass share no gather: at most one more.
        again += gathers.first * batches
    hpz = settings.hpz if settings.hpz > 1 else world
    return {
        "parameters, first use": _moved((gathers.first + gathered) * from_all, world, settings),
        "parameters, used again": _moved(again, hpz, settings),
        "small parameters": _moved(small, world, settings),
        "gradients": _moved(trained * batches, world, settings),
    }


def _safety(shape: ModelShape, settings: Settings) -> dict[str, Traffic]:
    world = settings.data_parallel
    trunk = sum(padded(module.numels, shape, world) for module in shape.trunk)
    head = padded((shape.head_parameters,), shape, world)
    expected = expected_rows(settings, group_batches=group_batches(shape, settings))
    passes, heads = {
        "sft": (0.0, 0.0),
        "routed": (expected.passes, expected.head_gathers),
        "stored": (0.0, expected.head_gathers),
        "always_on": (settings.grad_accum, settings.grad_accum),
    }[settings.arm]
    probes = settings.grad_accum * settings.probe_depth if settings.arm == "routed" else 0.0
    if settings.has_adapters_off:
        heads = 0.0  # the policy's, which is whole at that moment
    agreed = 2 * AGREEMENT_BYTES[settings.arm] / settings.itemsize
    return {
        "reference trunk": _moved(trunk * passes, world, settings),
        "reference head": _moved(head * heads, world, settings),
        "probe, first epoch": _moved(trunk * probes, world, settings),
        "agreement": _moved(agreed, world, settings),
    }


def _moved(elements: float, group: int, settings: Settings) -> Traffic:
    """Of tensors gathered over `group` neighbouring ranks."""
    received = elements * settings.itemsize * (group - 1) / group
    return over_ring(received, group, 1, settings.gpus_per_node)


def over_ring(received: float, group: int, stride: int, gpus_per_node: int) -> Traffic:
    """Bytes of a rank, of a ring of `group` ranks that are `stride` apart, by kind of link."""
    node = max(1, gpus_per_node // stride)
    if group <= node:
        return Traffic(inside=received, between=0.0)
    return Traffic(inside=received * (node - 1) / node, between=received / node)
