"""A plan of a Megatron layout: memory and bytes by stage, FLOPs, slots and time of a step."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from safereg_dist.parallel.hardware import USABLE_MEMORY, Gpu
from safereg_dist.plan.flops import trunk_flops
from safereg_dist.plan.megatron.memory import (
    active_law,
    fullest_stage,
    mean_of,
    stage_memory,
    state_bytes,
)
from safereg_dist.plan.megatron.stages import (
    check_layout,
    layers_at,
    padded_vocab,
    parameters,
    pipeline_of,
)
from safereg_dist.plan.megatron.traffic import forward_bytes, over, stage_traffic
from safereg_dist.plan.pipeline import Pipeline, Work, bubble_room, timeline
from safereg_dist.plan.plan import overhead, transfer_seconds
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape
from safereg_dist.plan.traffic import Traffic

ARMS = ("sft", "routed", "bubble", "always_on")
"""Plain training; the reference before the step, on micro-batches with a risky row; the same in the
idle slots of the step before; on every micro-batch, with whole logits."""


def settings_of(settings: Settings, arm: str) -> Settings:
    """The settings of one of `ARMS`."""
    is_bubble = arm == "bubble"
    return replace(settings, arm="routed" if is_bubble else arm, reference_in_bubble=is_bubble)


@dataclass(frozen=True, kw_only=True)
class LayoutCosts:
    """One arm's cost of an optimizer step."""

    shape: ModelShape
    settings: Settings
    gpu: Gpu

    @property
    def pipeline(self) -> Pipeline:
        """The schedule."""
        return pipeline_of(self.settings)

    @cached_property
    def active(self) -> float:
        """Expected micro-batches of a replica whose loss reads the reference."""
        return mean_of(active_law(self.settings, replicas=1), float)

    @cached_property
    def run(self) -> float:
        """Expected micro-batches that its reference runs on: interleaved, whole groups."""
        if self.settings.reference_in_bubble:
            return self.active
        return mean_of(active_law(self.settings, replicas=1), self.pipeline.whole_groups)

    @cached_property
    def flops(self) -> dict[str, float]:
        """FLOPs over all ranks, by item."""
        return step_flops(self.shape, self.settings, active=self.active, run=self.run)

    @cached_property
    def memory(self) -> list[dict[str, float]]:
        """Stage -> bytes of one rank, by part."""
        stages = range(self.settings.pipeline_parallel)
        return [stage_memory(self.shape, self.settings, stage) for stage in stages]

    @cached_property
    def traffic(self) -> list[dict[str, Traffic]]:
        """Stage -> bytes that one rank receives, by item."""
        own = {"active": self.active, "run": self.run}
        stages = range(self.settings.pipeline_parallel)
        return [stage_traffic(self.shape, self.settings, stage, **own) for stage in stages]

    @cached_property
    def fullest(self) -> tuple[int, float]:
        """(stage, bytes) of the stage with the highest peak."""
        return fullest_stage(self.shape, self.settings)

    @property
    def total_flops(self) -> float:
        """Sum over all items."""
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> float:
        """Bytes that a rank receives, a mean over stages."""
        return sum(part.total for own in self.traffic for part in own.values()) / len(self.traffic)

    @cached_property
    def reference_slots(self) -> float:
        """Expected slots of the reference that make a step of the fullest replica longer."""
        beside = self.settings.reference_in_bubble
        added = self.pipeline.added_beside_bubble if beside else self.pipeline.added_slots
        return mean_of(active_law(self.settings, replicas=self.settings.data_parallel), added)

    @cached_property
    def seconds(self) -> float:
        """Time of a step; see `_seconds`."""
        return _seconds(self)


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """A Megatron layout, and each arm's cost."""

    shape: ModelShape
    settings: Settings
    gpu: Gpu
    proposed: tuple[str, ...] = ()
    """Why the proposed sizes are not smaller; empty where all were given."""

    @cached_property
    def arms(self) -> dict[str, LayoutCosts]:
        """Arm -> costs."""
        own = {arm: settings_of(self.settings, arm) for arm in ARMS}
        return {
            arm: LayoutCosts(shape=self.shape, settings=s, gpu=self.gpu) for arm, s in own.items()
        }

    @property
    def chosen(self) -> LayoutCosts:
        """The costs of the settings' own arm."""
        return self.arms["bubble" if self.settings.reference_in_bubble else self.settings.arm]

    @property
    def pipeline(self) -> Pipeline:
        """The schedule."""
        return pipeline_of(self.settings)

    @property
    def usable_bytes(self) -> float:
        """GPU memory available to tensors."""
        return USABLE_MEMORY * self.gpu.memory_bytes

    @property
    def fits(self) -> bool:
        """True if the fullest stage fits."""
        return self.chosen.fullest[1] <= self.usable_bytes

    def overhead(self, arm: str) -> dict[str, float]:
        """Extra FLOPs, bytes and time of an arm, as shares of plain training's."""
        return overhead(self.arms[arm], self.arms["sft"])

    def to_json(self) -> dict[str, Any]:
        """All numbers, in bytes, FLOPs, slots and seconds."""
        pipeline, stages = self.pipeline, range(self.settings.pipeline_parallel)
        return {
            "model": {"model_type": self.shape.model_type, "parameters": self.shape.parameters},
            "settings": asdict(self.settings),
            "gpu": asdict(self.gpu),
            "fits": self.fits,
            "proposed": list(self.proposed),
            "parameters": [parameters(self.shape, self.settings, stage) for stage in stages],
            "slots": {
                "step": pipeline.slots,
                "idle": pipeline.idle_slots,
                "bubble_room": bubble_room(pipeline),
            },
            "arms": {
                arm: {
                    "flops": costs.flops,
                    "memory": costs.memory,
                    "bytes_per_rank": [
                        {item: asdict(part) for item, part in own.items()} for own in costs.traffic
                    ],
                    "active_micro_batches": costs.active,
                    "run_micro_batches": costs.run,
                    "reference_slots": costs.reference_slots,
                    "seconds": costs.seconds,
                    "overhead": self.overhead(arm),
                }
                for arm, costs in self.arms.items()
            },
        }


def make_layout_plan(
    shape: ModelShape, settings: Settings, gpu: Gpu, *, proposed: tuple[str, ...] = ()
) -> LayoutPlan:
    """The plan of a layout.

    Raises:
        ConfigError: see `check_layout`.
    """
    check_layout(shape, settings)
    return LayoutPlan(shape=shape, settings=settings, gpu=gpu, proposed=proposed)


def step_flops(
    shape: ModelShape, settings: Settings, *, active: float, run: float
) -> dict[str, float]:
    """FLOPs over all ranks, by item (matrix products; see `plan.flops`).

    Of each replica's micro-batches, `active` ones read the reference, which runs on `run`. The
    plain head multiplies all tokens with the padded vocabulary; the fused one, of micro-batches
    with a risky row, those that are trained on, and the reference's those of risky rows.
    """
    replicas, batch = settings.data_parallel, settings.micro_batch
    row = replicas * batch * trunk_flops(shape, settings.seq_length)
    token = 2 * replicas * shape.hidden_size * padded_vocab(shape, settings)
    fused = active if settings.arm == "routed" else 0.0
    plain_tokens = (settings.grad_accum - fused) * batch * settings.seq_length
    fused_tokens = fused * batch * settings.response_tokens
    rows = settings.grad_accum * batch
    risky_tokens = rows * settings.risky_fraction * settings.response_tokens
    if settings.arm != "routed":
        risky_tokens = rows * settings.seq_length * (settings.arm == "always_on")
    batches = settings.grad_accum
    return {
        "policy forward": batches * row,
        "policy backward": 2 * batches * row,
        "recomputation": batches * row * settings.activation_checkpointing,
        "head, cross-entropy": 3 * token * (plain_tokens + fused_tokens),
        "reference trunk": run * row,
        "head, divergence": token * risky_tokens,
    }


def _seconds(costs: LayoutCosts) -> float:
    """Time of the schedule, of the reference before it, and of what data parallelism exposes.

    Each work takes its products' time and its tensor-parallel exchange after them; exchanges of
    keys and values overlap with products. The head's work is the last place's, two thirds of it
    backward. The reference adds `reference_slots` of the slowest chunk's forward. Gradients are
    summed beside the last micro-batch's backward, weights gathered beside the first's forward.
    """
    settings, pipeline = costs.settings, costs.pipeline
    places = range(pipeline.stages * pipeline.chunks)
    trunk = [_chunk_seconds(costs, place) for place in places]
    head = _head_seconds(costs)

    def work_seconds(work: Work) -> float:
        is_head = work.place == places[-1]
        if work.is_forward:
            return trunk[work.place] + head / 3 * is_head
        return pipeline.backward * trunk[work.place] + head * 2 / 3 * is_head

    schedule = max(own[-1][2] for own in timeline(pipeline, work_seconds))
    reference = costs.reference_slots * max(trunk) if settings.arm != "sft" else 0.0
    chunks = pipeline.chunks * min(trunk)
    exposed = _beyond(costs, "data, gradients", pipeline.backward * chunks)
    exposed += _beyond(costs, "data, weights", chunks)
    return schedule + reference + exposed


def _beyond(costs: LayoutCosts, item: str, covered: float) -> float:
    """Seconds by which an exchange lasts longer than what runs beside it, on the slowest stage."""
    longest = max(transfer_seconds(own[item], costs.gpu) for own in costs.traffic)
    return max(0.0, longest - covered)


def _chunk_seconds(costs: LayoutCosts, place: int) -> float:
    """One forward of a micro-batch through a chunk of layers, and the arrival of its input."""
    shape, settings, gpu = costs.shape, costs.settings, costs.gpu
    layers = layers_at(shape, settings, place)
    moved = forward_bytes(shape, settings, layers)
    moved["pipeline"] = state_bytes(shape, settings) * (place > 0)
    tensor, context, arrival = (
        transfer_seconds(over(settings, group, moved[group]), gpu)
        for group in ("tensor", "context", "pipeline")
    )
    sharers = settings.tensor_parallel * settings.context_parallel
    row = trunk_flops(shape, settings.seq_length) * layers / shape.num_layers
    products = settings.micro_batch * row / sharers / (settings.mfu * gpu.flops_per_s)
    return max(products, context) + tensor + arrival


def _head_seconds(costs: LayoutCosts) -> float:
    """The loss of a micro-batch, forward and backward, a mean over those of a step."""
    settings = costs.settings
    work = costs.flops["head, cross-entropy"] + costs.flops["head, divergence"]
    ranks = settings.world_size / settings.pipeline_parallel
    return work / ranks / settings.grad_accum / (settings.mfu * costs.gpu.flops_per_s)
