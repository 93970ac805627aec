"""Claimed: models that scale or cap the logits behind their head (Gemma 2, Cohere, Granite) train
as the equations say, alone and on two ranks: scale and cap are the loss's, not that of its scalar.

The judge is float64, whole logits of plain transformers (`stack_cases.expected`); float32 rounds.
"""

import pytest
from stack_cases import check_run, expected, write_models
from support.launching import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
WORKER = ROOT / "tests" / "distributed" / "stack_worker.py"
STEPS = 2


@pytest.mark.parametrize(
    ("stack", "family"),
    [
        ("trainer", "gemma2"),
        ("trainer", "cohere"),
        ("trainer-zero-3", "granite"),
        ("trainer-zero-3", "gemma2"),
        ("trainer-fsdp2", "cohere"),
    ],
)
def test_scaled_and_capped_logits_train_as_the_equations_say(stack, family, launch, tmp_path):
    write_models(tmp_path, family)
    out = tmp_path / "out.safetensors"
    ranks = 1 if stack == "trainer" else 2
    done = launch(WORKER, stack, str(tmp_path), str(out), "--steps", str(STEPS), ranks=ranks)
    assert done.status == 0, done.output[-4000:]
    check_run(out, expected(tmp_path, steps=STEPS))
