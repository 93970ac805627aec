"""Claimed: with adapters (PEFT) on two ranks, under ZeRO-3 and under FSDP2, the policy with its
adapters off is the reference: loss and gradients are those of the equations, whatever is trained
whole and whichever adapters are on. Under ZeRO-3 both passes keep their traces over many steps,
with activation checkpointing too, and no parameter stays gathered.

The judge is float64, whole logits of a second model (see `support.adapted`); float32 rounds. Exact:
counts of traces and of parameters.
"""

import json

import pytest
from safetensors.torch import load_file
from support.adapted import CASES, Outcome, check, expected
from support.launching import ROOT

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.deepspeed,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
WORKER = ROOT / "tests" / "distributed" / "lora_worker.py"
LONG = ROOT / "benchmarks" / "lora_zero3_worker.py"


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_adapters_on_two_ranks_equal_the_equations(engine, launch, tmp_path):
    done = launch(WORKER, engine, str(tmp_path))
    assert done.status == 0, done.output[-4000:]
    for case in CASES:
        tensors = load_file(tmp_path / f"{case.name}.safetensors")
        losses = tensors.pop("losses").tolist()
        check(Outcome(losses, tensors), expected(case), f"{case.name} under {engine}")
    if engine == "zero3":
        assert "regularizer.bind" in (tmp_path / "unbound.txt").read_text()


@pytest.mark.parametrize("options", [[], ["--checkpointing"]], ids=["plain", "checkpointing"])
def test_traces_hold_over_many_steps_of_zero3(options, launch, tmp_path):
    done = launch(LONG, "18", str(tmp_path / "found.json"), *options)
    assert done.status == 0, done.output[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["invalidated_after_5"] == 0, found
    assert found["left_gathered"] == 0, found
    assert found["worst_gap"] < 1e-6, found
