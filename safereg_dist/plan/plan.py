"""A plan: memory, FLOPs, bytes and time of a run, and what it costs against plain fine-tuning."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from safereg_dist.parallel.hardware import LINK_EFFICIENCY, USABLE_MEMORY, Gpu
from safereg_dist.plan.adapters import trained_numels
from safereg_dist.plan.flops import flops
from safereg_dist.plan.memory import CHECKPOINT_BYTES, Memory, memory
from safereg_dist.plan.offload import offload_seconds
from safereg_dist.plan.risky_rows import expected_rows
from safereg_dist.plan.settings import ARMS, Settings
from safereg_dist.plan.shape import ModelShape
from safereg_dist.plan.traffic import Traffic, traffic

SAFETY = ("reference trunk", "head, divergence", "probe, first epoch", "reference head")
"""Items that plain fine-tuning does not have and that take time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """One arm's cost of an optimizer step."""

    arm: str
    flops: dict[str, float]
    """FLOPs over all ranks, by item."""
    traffic: dict[str, Traffic]
    """Bytes that one rank receives, by item."""
    memory: Memory
    """Memory of one rank."""
    seconds: float
    """Expected time of the step on the slowest rank."""

    @property
    def total_flops(self) -> float:
        """Sum over all items."""
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> float:
        """Sum over all items and links."""
        return sum(part.total for part in self.traffic.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of a plan, and each arm's cost."""

    shape: ModelShape
    settings: Settings
    gpu: Gpu
    arms: dict[str, Costs]
    """Arm -> costs; `sft` is always included."""

    @property
    def chosen(self) -> Costs:
        """The costs of the arm in the settings."""
        return self.arms[self.settings.arm]

    @property
    def usable_bytes(self) -> float:
        """GPU memory available to tensors."""
        return USABLE_MEMORY * self.gpu.memory_bytes

    @property
    def fits(self) -> bool:
        """True if the peak fits into the GPU's memory."""
        return self.chosen.memory.gpu <= self.usable_bytes

    @property
    def checkpoint_bytes(self) -> float:
        """A checkpoint on disk."""
        return float(CHECKPOINT_BYTES * sum(trained_numels(self.shape, self.settings)))

    @property
    def export_bytes(self) -> float:
        """The model that a run leaves behind, adapters merged."""
        return float(self.settings.itemsize * self.shape.parameters)

    def overhead(self, arm: str) -> dict[str, float]:
        """Extra FLOPs, bytes and time of an arm, as shares of plain fine-tuning's."""
        return overhead(self.arms[arm], self.arms["sft"])

    def to_json(self) -> dict[str, Any]:
        """All numbers, in bytes, FLOPs and seconds."""
        shape = self.shape
        return {
            "model": {
                "model_type": shape.model_type,
                "parameters": shape.parameters,
                "active_parameters": shape.active_parameters,
                "is_tied": shape.is_tied,
                **{name: shape.part(name) for name in ("embedding", "layers", "final", "head")},
            },
            "settings": asdict(self.settings),
            "gpu": asdict(self.gpu),
            "assumptions": {
                "mfu": self.settings.mfu,
                "link_efficiency": LINK_EFFICIENCY,
                "usable_memory": USABLE_MEMORY,
            },
            "fits": self.fits,
            "disk": {"checkpoint": self.checkpoint_bytes, "model": self.export_bytes},
            "arms": {
                arm: {
                    "flops": costs.flops,
                    "bytes_per_rank": {k: asdict(v) for k, v in costs.traffic.items()},
                    "memory": asdict(costs.memory),
                    "gpu_bytes": costs.memory.gpu,
                    "seconds": costs.seconds,
                    "overhead": self.overhead(arm),
                }
                for arm, costs in self.arms.items()
            },
        }


def overhead(own: Any, base: Any) -> dict[str, float]:
    """Extra FLOPs, bytes and time, as shares of those of `base`; costs of two arms of one plan."""
    return {
        "flops": own.total_flops / base.total_flops - 1,
        "bytes": own.total_bytes / base.total_bytes - 1 if base.total_bytes else 0.0,
        "seconds": own.seconds / base.seconds - 1,
    }


def make_plan(shape: ModelShape, settings: Settings, gpu: Gpu) -> Plan:
    """The plan of a run, with the costs of all arms."""
    return Plan(
        shape=shape,
        settings=settings,
        gpu=gpu,
        arms={arm: arm_costs(shape, replace(settings, arm=arm), gpu) for arm in ARMS},
    )


def arm_costs(shape: ModelShape, settings: Settings, gpu: Gpu) -> Costs:
    """Costs of one arm."""
    work, moved = flops(shape, settings), traffic(shape, settings)
    return Costs(
        arm=settings.arm,
        flops=work,
        traffic=moved,
        memory=memory(shape, settings),
        seconds=_seconds(work, moved, settings, gpu) + offload_seconds(shape, settings),
    )


def _seconds(
    work: dict[str, float], moved: dict[str, Traffic], settings: Settings, gpu: Gpu
) -> float:
    """Time of the policy's passes, and after them of the reference's.

    Within each, products and communication overlap: the longer counts. All ranks wait for the one
    with the most risky rows in the reference's passes; nothing overlaps the gather of its head.
    """
    policy = sum(n for part, n in work.items() if part not in SAFETY)
    comm = sum(transfer_seconds(m, gpu) for part, m in moved.items() if part not in SAFETY)
    rate = settings.mfu * gpu.flops_per_s * settings.world_size
    head = _skew(settings) * work["head, divergence"] / rate
    return (
        max(policy / rate, comm)
        + sum(trunk_seconds(work, moved, settings, gpu).values())
        + head
        + transfer_seconds(moved["reference head"], gpu)
    )


def trunk_seconds(
    work: dict[str, float], moved: dict[str, Traffic], settings: Settings, gpu: Gpu
) -> dict[str, float]:
    """Time of the reference's passes over risky rows, and of the probe's over all, by item."""
    rate = settings.mfu * gpu.flops_per_s * settings.world_size
    skews = {"reference trunk": _skew(settings), "probe, first epoch": 1.0}
    return {
        part: max(skew * work[part] / rate, transfer_seconds(moved[part], gpu))
        for part, skew in skews.items()
    }


def _skew(settings: Settings) -> float:
    """Risky rows of the fullest rank, for which all wait, over those of a rank."""
    if settings.arm not in ("routed", "stored"):
        return 1.0
    expected = expected_rows(settings)
    return expected.most_rows / expected.mean_rows if expected.mean_rows else 1.0


def transfer_seconds(moved: Traffic, gpu: Gpu) -> float:
    """Seconds of what a rank receives; both kinds of link work at the same time."""
    inside = moved.inside / (LINK_EFFICIENCY * gpu.node_bytes_per_s)
    return max(inside, moved.between / (LINK_EFFICIENCY * gpu.network_bytes_per_s))
