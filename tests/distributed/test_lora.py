"""Claimed: with adapters (PEFT) on two ranks, under ZeRO-3 and under FSDP2, the policy with its
adapters off is the reference: loss and gradients are those of the equations, whatever is trained
whole and whichever adapters are on. Under ZeRO-3 both passes keep their traces over many steps,
with activation checkpointing too, and no parameter stays gathered.

The judge is float64, whole logits of a second model (see `support.adapted`); float32 rounds. Exact:
counts of traces and of parameters.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.adapted import CASES, IDS, Outcome, base_of, check, expected
from support.extent import FULL
from support.launching import ROOT

from safereg_dist.models.fingerprint import model_fingerprint

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.deepspeed,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
WORKER = ROOT / "tests" / "distributed" / "lora_worker.py"
UNDER_ZERO3 = ("plain", "embedding", "tied-head", "capped-head", "two", "frozen", "adapter-head")
"""What is trained whole, which adapters are on; all cases in the full mode, and under FSDP2."""
LONG = ROOT / "benchmarks" / "lora_zero3_worker.py"


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_adapters_on_two_ranks_equal_the_equations(engine, launch, tmp_path):
    chosen = [case for case in CASES if FULL or engine != "zero3" or case.name in UNDER_ZERO3]
    done = launch(WORKER, engine, str(tmp_path), *(case.name for case in chosen))
    assert done.status == 0, done.output[-4000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    for case in chosen:
        tensors = load_file(tmp_path / f"{case.name}.safetensors")
        losses, prefix = tensors.pop("losses").tolist(), tensors.pop("prefix")
        check(Outcome(losses, tensors), expected(case), f"{case.name} under {engine}")
        base = base_of(case)
        if case.reference is None:
            torch.testing.assert_close(prefix, states_after_two_layers(base))
        if engine == "zero3":
            known = {"left": [], "fingerprint": model_fingerprint(base)}
            assert facts[case.name] == known, case.name
    if engine == "zero3":
        assert "regularizer.bind" in facts["unbound"]


def states_after_two_layers(model):
    """What a probe on the base model would read."""
    with torch.no_grad():
        return model(input_ids=IDS, output_hidden_states=True).hidden_states[2]


@pytest.mark.parametrize("options", ["", "--checkpointing", "--frozen"])
def test_traces_hold_over_many_steps_of_zero3(options, launch, tmp_path):
    steps = "18" if FULL else "9"
    done = launch(LONG, steps, str(tmp_path / "found.json"), *options.split())
    assert done.status == 0, done.output[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["invalidated_after_5"] == 0, found
    assert found["left_gathered"] == 0, found
    assert found["worst_gap"] < 1e-6, found
