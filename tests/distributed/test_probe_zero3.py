"""Claimed: under ZeRO-3 the probe scores every row as plain transformers does, from either source;
stopping the reference early leaves none of its parameters gathered; a loss that is not finite on
one rank is skipped by all.

Rounds: float32 against float64 (1e-5). Exact: which rows are scored, what is gathered, who steps.
"""

import json

import numpy as np
import pytest
import torch
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.launching import FINETUNE, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
WORKER = ROOT / "tests" / "distributed" / "probe_worker.py"
LAYER = 2


def make_run(folder):
    """A model of 6 layers, a random probe on its layer 2, prompts of several lengths."""
    model = tiny_model(seed=0, num_hidden_layers=6)
    save_model(folder / "model", model)
    write_jsonl(folder / "train.jsonl", random_rows(31, risk=False))
    generator = torch.Generator().manual_seed(1)
    probe = Probe(
        layer=LAYER,
        pooling="last_prompt_token",
        mean=torch.randn(32, generator=generator),
        scale=torch.rand(32, generator=generator) + 0.5,
        weight=torch.randn(32, generator=generator) / 5,
        bias=0.2,
        threshold=0.5,
        fingerprint=model_fingerprint(model),
        meta={},
    )
    probe.save(folder / "probe")
    (folder / "base.yaml").write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{train: {folder / 'train.jsonl'}}}\n"
        f"risk: {{estimator: probe, path: {folder / 'probe'}, max_held_back: 1.0}}\n"
        "reference: {rows_per_pass: 2}\n"
        "train: {precision: fp32, micro_batch_size: 3}\n"
        f"output_dir: {folder / 'out'}\n"
    )
    return probe


def expected_risk(folder, probe):
    """Probability of every row by plain transformers in float64 and NumPy."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    risk = {}
    for line in (folder / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[LAYER][0, -1].numpy()
        z = (states - probe.mean.numpy()) / probe.scale.numpy()
        risk[row["id"]] = 1 / (1 + np.exp(-(z @ probe.weight.numpy() + probe.bias)))
    return risk


def test_probe_and_skipping_under_zero3(tmp_path, launch):
    probe = make_run(tmp_path)
    done = launch(WORKER, str(tmp_path), ranks=2)
    assert done.status == 0, done.output[-4000:]
    expected = expected_risk(tmp_path, probe)
    found = [json.loads((tmp_path / f"found.rank{r}.json").read_text()) for r in range(2)]

    scored = [set(f["reference"]["risk"]) for f in found]
    assert not scored[0] & scored[1], "a row was dealt to both ranks"
    assert scored[0] | scored[1] == set(expected)
    assert sum(f["reference"]["cached"] for f in found) == len(expected)
    for source in ("reference", "policy"):
        for rank in range(2):
            for name, value in found[rank][source]["risk"].items():
                assert value == pytest.approx(expected[name], abs=1e-5), (source, name)
            assert not any(found[rank][source]["left"]), "parameters were left gathered"
    assert min(expected.values()) < 0.5 < max(expected.values())
    # Step 0: rank 1's loss is nan, nobody steps. Step 1: all step.
    for rank in range(2):
        assert found[rank]["not_finite"]["applied_and_unchanged"] == [False, True, True, False]


def test_three_steps_that_are_not_finite_end_the_run(tmp_path, launch):
    make_run(tmp_path)
    done = launch(
        FINETUNE,
        tmp_path / "base.yaml",
        *("optimizer.lr=1e30", "optimizer.warmup_ratio=0", "regularizer.objective=none"),
        ranks=2,
    )
    assert done.status == 1, done.output[-3000:]
    assert done.output.count("3 optimizer steps in a row") == 1, done.output[-3000:]
