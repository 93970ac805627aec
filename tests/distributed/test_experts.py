"""Claimed: mixtures of experts train in the Trainer alone, under ZeRO-3 and under FSDP2 as the
equations say, on ranks whose tokens choose different experts too; the routers' own loss is added
to the loss, outside of cross-entropy and divergence, as a mean over micro-batches. The engines of
`safereg train` do not add it: their rows come without a mask, so padding would be in it.

The judge is float64, whole logits (see `stack_cases.expected`); float32 rounds.
"""

import pytest
from stack_cases import ROWS_PER_STEP, check_run, expected, write_models
from support.launching import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
WORKER = ROOT / "tests" / "distributed" / "stack_worker.py"
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
MANY = {"num_local_experts": 32, "num_experts": 32}
"""Experts, so that a micro-batch of one row leaves most of them out."""
STEPS = 2


@pytest.mark.parametrize(
    ("stack", "family", "changes", "accumulation"),
    [
        ("trainer", "mixtral", ROUTED, 1),
        ("trainer", "qwen3_moe", {}, 1),
        ("trainer-zero-3", "mixtral", MANY, 12),
        ("trainer-zero-3", "qwen3_moe", ROUTED, 2),
        ("trainer-fsdp2", "mixtral", ROUTED, 2),
        ("single", "mixtral", ROUTED, 2),
        ("deepspeed-zero-3", "mixtral", ROUTED, 2),
    ],
)
def test_experts_train_as_the_equations_say(stack, family, changes, accumulation, launch, tmp_path):
    write_models(tmp_path, family, **changes)
    ranks = 1 if stack in ("trainer", "single") else 2
    out = tmp_path / "out.safetensors"
    options = ["--accumulation", str(accumulation), "--steps", str(STEPS)]
    done = launch(WORKER, stack, str(tmp_path), str(out), *options, ranks=ranks)
    assert done.status == 0, done.output[-4000:]
    is_routed = changes is ROUTED and stack.startswith("trainer")
    rows = ROWS_PER_STEP // (ranks * accumulation) if is_routed else 0
    check_run(out, expected(tmp_path, steps=STEPS, rows_routed=rows))
