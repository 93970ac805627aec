"""Claimed: engine fsdp2 trains, resumes and exports; its references serve policies under ZeRO-3.

Exact: a resumed run (bf16, dropout, gradients accumulated) gives the same bits; what was saved on
two ranks is what four ranks load and export; the weights' fingerprint is that of ZeRO-3; nothing is
left whole after a pass of the reference; a gradient that is not finite on one rank moves no weight.
Within 5 %: the bytes of a rank between steps are its
share. Rounds: float32 losses and states beside those of ZeRO-3 and of plain transformers.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.builders import (
    random_rows,
    save_model,
    tiny_experts,
    tiny_model,
    word_tokenizer,
    write_jsonl,
)
from support.launching import FINETUNE, ROOT
from support.ranks import ALONE, on_ranks
from test_resume import result
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.parallel.fsdp2 import Fsdp2Backend
from safereg_dist.parallel.shards import weights_fingerprint
from safereg_dist.parallel.single import SingleBackend
from safereg_dist.reference import ReferenceTrunk
from safereg_dist.run.export import export_model

WORKER = ROOT / "tests" / "distributed" / "fsdp2_worker.py"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab": 1001}
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """A tied policy, an untied reference, data and configuration."""
    policy = tiny_model(seed=0, tie_word_embeddings=True, attention_dropout=0.2, **SIZES)
    save_model(tmp_path / "policy", policy)
    save_model(tmp_path / "reference", tiny_model(seed=1, **SIZES))
    write_jsonl(tmp_path / "train.jsonl", random_rows(40))
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path / 'policy'}\n"
        f"reference: {{model: {tmp_path / 'reference'}}}\n"
        f"data: {{train: {tmp_path / 'train.jsonl'}, validation: {tmp_path / 'train.jsonl'}}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "train: {steps: 6, micro_batch_size: 2, grad_accum_steps: 2, save_every: 3, "
        "eval_every: 2}\n"
        "optimizer: {lr: 0.001}\n"
        "engine: {name: fsdp2}\n"
        f"output_dir: {tmp_path / 'whole'}\n"
    )
    return tmp_path


def run_worker(folder, launch, work, *, ranks):
    """What every rank found."""
    done = launch(WORKER, str(folder), work, ranks=ranks)
    assert done.status == 0, done.output[-4000:]
    return [json.loads((folder / f"{work}.rank{rank}.json").read_text()) for rank in range(ranks)]


def train_and_resume(folder, launch, *overrides):
    """A run, and its copy without what the end wrote: goes on to the same bits. The copy."""
    done = launch(FINETUNE, folder / "run.yaml", *overrides, ranks=2)
    assert done.status == 0, done.output[-4000:]
    expected = result(folder / "whole")
    again = folder / "again"
    shutil.copytree(folder / "whole", again)
    shutil.rmtree(again / "model")
    (again / "summary.json").unlink()
    done = launch(FINETUNE, folder / "run.yaml", *overrides, f"output_dir={again}", ranks=2)
    assert done.status == 0, done.output[-4000:]
    assert "resuming from" in done.output
    assert result(again) == expected
    return again


def test_train_resume_move_and_export(folder, launch):
    train_and_resume(folder, launch)

    found = run_worker(folder, launch, "moved", ranks=4)
    dcp_to_torch_save(folder / "whole/checkpoint/step-00000003/engine", folder / "saved.pt")
    saved = torch.load(folder / "saved.pt")["model"]
    exported = AutoModelForCausalLM.from_pretrained(folder / "moved")
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    for name, parameter in exported.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, saved[name].bfloat16()), name
    for rank in found:
        assert rank["losses"] == found[0]["losses"]
        assert rank["live"] <= 1.05 * rank["whole"] / 4, rank
        assert rank["skipped"]


@pytest.mark.deepspeed
def test_reference_beside_a_policy_under_zero3(folder, launch):
    save_model(folder / "experts", tiny_experts("qwen3_moe"))
    experts = model_fingerprint(AutoModelForCausalLM.from_pretrained(folder / "experts"))
    found = run_worker(folder, launch, "beside", ranks=2)
    model = AutoModelForCausalLM.from_pretrained(folder / "reference")
    ids = torch.arange(6, 26).reshape(2, 10)
    with torch.no_grad():
        states = model.base_model(ids, output_hidden_states=True).hidden_states
    for rank in found:
        assert rank["fsdp2"] == pytest.approx(rank["zero3"], rel=1e-6)
        assert rank["fingerprints"][0] == rank["fingerprints"][1]
        assert rank["same_head"]
        assert rank["experts"] == experts
        for layers, (left, *some) in zip((2, 3, 1, 3, 2), rank["passes"], strict=True):
            assert left == 0
            assert some == pytest.approx(states[layers].flatten()[::37].tolist(), abs=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_apart(family, tmp_path):
    """Fused on loading, each rank reading its own experts: the model of plain transformers.

    The export has them apart again.
    """
    save_model(tmp_path / "model", tiny_experts(family))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert any(".experts.4." in name for name in stored)
    alone = SingleBackend(ALONE)
    model = alone.load_model(tmp_path / "model", precision="fp32", offload="none")
    export_model(model, word_tokenizer(), tmp_path / "out", backend=alone, shard_bytes=20_000)
    exported = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(exported) > 1
    assert sorted(name for file in exported for name in file) == sorted(stored)
    assert all(torch.equal(file[name], stored[name]) for file in exported for name in file)
    ids = torch.arange(6, 26).reshape(2, 10)

    def loaded(ranks):
        backend = Fsdp2Backend(ranks)
        model = backend.load_model(tmp_path / "model", precision="fp32", offload="none")
        engine = backend.wrap_reference(ReferenceTrunk(model), offload="none", rows=2)
        prints = backend.fingerprint(model), weights_fingerprint(tmp_path / "model", ranks)
        return [*prints, engine(ids).flatten()[::37].tolist()]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        states = model.base_model(ids).last_hidden_state.flatten()[::37].tolist()
    for one, other, some in on_ranks(3, loaded, tmp_path):
        assert one == other == model_fingerprint(model)
        assert some == pytest.approx(states, abs=1e-5)
