"""Claimed: on two ranks a reference with an engine of its own and `reference.adapter` on is the one
of the pass through the policy, and fingerprints with a frozen adapter are those of one process; a
folder that holds no adapter ends all ranks with one line.

Losses round in float32. Exact: fingerprints.
"""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.launching import FINETUNE

from safereg_dist.models.fingerprint import model_fingerprint

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


@pytest.fixture
def folder(tmp_path):
    """A model, an earlier adapter, data and configuration."""
    save_model(tmp_path / "model", tiny_model())
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    earlier = get_peft_model(tiny_model(), config)
    torch.manual_seed(1)
    for name, parameter in earlier.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape))
    earlier.save_pretrained(tmp_path / "aligned")
    write_jsonl(tmp_path / "train.jsonl", random_rows(40))
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path / 'model'}\n"
        "reference: {adapter: aligned}\n"
        f"data: {{train: {tmp_path / 'train.jsonl'}}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "train: {steps: 3, micro_batch_size: 2, precision: fp32}\n"
        "optimizer: {lr: 0.01, warmup_ratio: 0}\n"
        f"lora: {{rank: 4, frozen: {{aligned: {tmp_path / 'aligned'}}}}}\n"
    )
    return tmp_path


@pytest.mark.parametrize(("engine", "own"), [("deepspeed", "zero3"), ("fsdp2", "fsdp2")])
def test_a_reference_of_its_own_has_the_adapter(engine, own, folder, launch):
    model = PeftModel.from_pretrained(tiny_model(), folder / "aligned", adapter_name="aligned")
    known = model_fingerprint(model.get_base_model(), ["aligned"])
    losses = []
    for reference in ("adapters_off", own):
        out = folder / reference
        how = (f"engine.name={engine}", f"reference.engine={reference}", f"output_dir={out}")
        done = launch(FINETUNE, folder / "run.yaml", *how, ranks=2)
        assert done.status == 0, done.output[-4000:]
        facts = json.loads((out / "summary.json").read_text())
        assert facts["fingerprints"] == {"policy": known, "reference": known}
        rows = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_all_ranks_end_with_one_line(folder, launch):
    (folder / "aligned" / "adapter_config.json").unlink()
    how = ("engine.name=deepspeed", "engine.zero_stage=2", f"output_dir={folder / 'out'}")
    done = launch(FINETUNE, folder / "run.yaml", *how, ranks=2)
    assert done.status != 0
    assert done.output.count("holds no adapter: expected adapter_config.json") == 1
    assert not (folder / "out").exists()
