"""The cases that the step is tested on; read by the ranks and by the judge."""

from dataclasses import dataclass

from support.extent import FULL

from safereg_dist.types import Row


@dataclass(frozen=True)
class Case:
    """One configuration of the loss."""

    name: str
    objective: str = "convex"
    divergence: str = "kl_forward"
    grad_accum_steps: int = 1
    ceiling: float = 0.7
    policy: str = "policy"
    """Name of the folder that holds the policy."""
    engine: tuple[str, ...] = ()
    """Overrides that change where things are, and no result."""
    reduces_each: bool = False
    """FSDP2 reduces gradients after each micro-batch, as those of a large model."""

    @property
    def anchors(self) -> bool:
        """Plain fine-tuning has no anchor rows (the configuration refuses them)."""
        return self.objective != "none"

    def overrides(self) -> list[str]:
        """The case as `key=value` overrides."""
        return [
            f"regularizer.objective={self.objective}",
            f"regularizer.divergence={self.divergence}",
            f"regularizer.ceiling={self.ceiling}",
            f"train.grad_accum_steps={self.grad_accum_steps}",
            f"model={self.policy}",
            *self.engine,
        ]


CASES = (
    Case("convex-forward-1"),
    Case("convex-forward-2", grad_accum_steps=2),
    Case("convex-forward-4", grad_accum_steps=4),
    Case("convex-reverse-1", divergence="kl_reverse"),
    Case("convex-l2-2", divergence="l2_logits", grad_accum_steps=2),
    Case("additive-forward-1", objective="additive", ceiling=2.5),
    Case("additive-reverse-2", objective="additive", divergence="kl_reverse", grad_accum_steps=2),
    Case("additive-l2-4", objective="additive", divergence="l2_logits", grad_accum_steps=4),
    Case("token-wise-2", objective="token_wise", grad_accum_steps=2),
    Case("static-forward-2", objective="static", ceiling=0.3, grad_accum_steps=2),
    Case("none-2", objective="none", grad_accum_steps=2),
    Case("convex-one-1", ceiling=1.0),
)


FSDP2_CASES = (
    Case("tied-forward-2", grad_accum_steps=2, policy="tied"),
    Case("tied-none-2", objective="none", grad_accum_steps=2, policy="tied"),
    Case("experts-forward-2", grad_accum_steps=2, policy="experts"),
    Case("reduced-each-2", grad_accum_steps=2, reduces_each=True),
    Case(
        "elsewhere-2",
        grad_accum_steps=2,
        policy="tied",
        engine=(
            *("engine.offload_params=cpu", "reference.offload=cpu"),
            "train.activation_checkpointing=true",
        ),
    ),
)


def cases_on(world_size: int, engine: str = "deepspeed") -> tuple[Case, ...]:
    """On two ranks all cases, under FSDP2 every other one; elsewhere some, and the engine's.

    The full mode has all on two ranks, every other one on one and three, and all of the engine.
    """
    own = FSDP2_CASES if engine == "fsdp2" else ()
    if FULL:
        return (CASES if world_size == 2 else CASES[::2]) + own
    if world_size == 2:
        return CASES if not own else CASES[::2] + own
    chosen = ("convex-forward-2", "additive-l2-4", "none-2", "tied-none-2", "reduced-each-2")
    return tuple(case for case in CASES + own if case.name in chosen)


RANDOM_STEPS = 40 if FULL else 16
"""Of random risk on three ranks, every fifth without any; many more: `window_cases`."""


SCHEDULE_LINEAR = "regularizer.schedule=linear"


def micro_batch_rows(rank: int, micro_batch: int, *, anchors: bool = True) -> list[Row]:
    """Three rows: lengths differ between ranks, one row has no response, rank 1 has no risk.

    Micro-batch 1 holds an anchor row; micro-batch 2 of rank 0 has no response token at all.
    """
    rows = []
    for index in range(3):
        salt = 17 * rank + 5 * micro_batch + index
        prompt = 2 + salt % 5
        response = 1 + (salt * 7) % 6 + 2 * rank
        masked = index == 2 and micro_batch % 2 == 0
        if micro_batch == 2 and rank == 0:
            masked = True
        length = prompt + response
        ids = [6 + (salt * 31 + 11 * t * (t + 3)) % 90 for t in range(length)]
        mask = [0] * prompt + [0 if masked else 1] * response
        anchor = anchors and micro_batch == 1 and index == 1
        rows.append(
            Row(
                id=f"r{rank}-m{micro_batch}-{index}",
                input_ids=ids,
                loss_mask=mask,
                prompt_ends=[] if masked else [prompt],
                risk=None if anchor else (0.0 if rank == 1 else (salt * 37 % 100) / 100),
                prompt_key=f"{rank:02d}{micro_batch:02d}{index:02d}" + "0" * 58,
                is_anchor=anchor,
            )
        )
    return rows
