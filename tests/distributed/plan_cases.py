"""The runs that the plan is measured on; read by the ranks and by the judge."""

from dataclasses import dataclass

from support.extent import FULL

from safereg_dist.plan.settings import Settings

MICRO_BATCH = 2
STEPS = 3  # deepspeed knows the order of modules from the third micro-batch on


@dataclass(frozen=True)
class Case:
    """One run; `risky` is the share of its rows above the threshold."""

    name: str
    risky: float = 0.0
    objective: str = "convex"
    grad_accum: int = 1
    precision: str = "fp32"
    checkpointing: bool = False
    reuse_distance: int = 1_000_000_000
    hpz: int = 1
    lora_rank: int = 0
    least: float = 0.95
    """Of the planned bytes so many are measured at least."""

    def overrides(self) -> list[str]:
        """The case as `key=value` overrides."""
        return [
            f"data.train=rows-{self.risky}.jsonl",
            f"regularizer.objective={self.objective}",
            f"train.grad_accum_steps={self.grad_accum}",
            f"train.precision={self.precision}",
            f"train.activation_checkpointing={str(self.checkpointing).lower()}",
            f"engine.hpz_partition_size={self.hpz}",
            *([f"lora.rank={self.lora_rank}"] if self.lora_rank else []),
        ]

    def settings(self, world_size: int) -> Settings:
        """The same for the planner."""
        return Settings(
            world_size=world_size,
            gpus_per_node=8,
            seq_length=16,
            micro_batch=MICRO_BATCH,
            grad_accum=self.grad_accum,
            risky_fraction=self.risky,
            arm="sft" if self.objective == "none" else "routed",
            balance="deal",
            hpz=self.hpz,
            activation_checkpointing=self.checkpointing,
            precision=self.precision,
            reuse_distance=self.reuse_distance,
            lora_rank=self.lora_rank,
        )


CASES = (
    Case("sft", objective="none"),
    Case("sft-recomputed", objective="none", checkpointing=True, reuse_distance=20_000),
    Case("one-in-eight", risky=0.125, grad_accum=4),
    Case("all-risky", risky=1.0, grad_accum=2, precision="bf16", reuse_distance=20_000),
    Case("lora", risky=1.0, grad_accum=2, lora_rank=4),
    Case("lora-far", risky=1.0, reuse_distance=20_000, lora_rank=4, least=0.75),
    Case(
        "lora-recomputed",
        objective="none",
        checkpointing=True,
        reuse_distance=20_000,
        lora_rank=4,
        least=0.75,
    ),
    Case("hpz", risky=1.0, grad_accum=2, reuse_distance=20_000, hpz=2),  # once in a process
)


def cases_on(world_size: int) -> tuple[Case, ...]:
    """All cases on two ranks; elsewhere, unless in the full mode, fewer: hpZ's needs four."""
    if FULL or world_size == 2:
        return CASES
    return (CASES[0], CASES[-1]) if world_size == 4 else (CASES[0], CASES[2])
