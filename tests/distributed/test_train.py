"""Claimed: `safereg train` logs what an independent computation gives, under every launcher, and
the exported folder is a plain checkpoint.

The judge is plain transformers in float64 on the rows that the ledger names. Rounds: float32
arithmetic (1e-5 relative). Exact: counts, file names, the equality of launchers on the same ranks.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from support import oracles
from support.builders import random_rows, save_model, tiny_model, word_tokenizer, write_jsonl
from support.extent import HAS_CPU_ADAM
from support.launching import FINETUNE
from support.results import TIMES
from transformers import AutoModelForCausalLM, AutoTokenizer

from safereg_dist.data import tokenize_row
from safereg_dist.run.ledger import verify_ledger

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
METRIC_KEYS = (
    "step loss task_loss divergence kl_coef_mean kl_coef_max risk_mean risk_max risky_fraction "
    "rows active_rows reference_rows response_tokens active_tokens grad_norm lr tokens_per_s "
    "step_time_s peak_memory_bytes"
).split()


# Adam forgets how long a gradient was, unless eps is as large: so that clipping shows.
CLIPPED = ("optimizer.max_grad_norm=0.1", "optimizer.eps=0.01")


def make_run(folder, family="llama", **model_changes):
    """Policy, another reference, data with risk, anchors; the configuration file."""
    model_changes = {"num_hidden_layers": 2, **model_changes}
    save_model(folder / "policy", tiny_model(family, seed=0, **model_changes))
    # Frozen, so its dropout must never be on: the judge is the model in evaluation mode.
    dropping = tiny_model(family, seed=1, attention_dropout=0.5, **model_changes)
    save_model(folder / "reference", dropping)
    write_jsonl(folder / "train.jsonl", random_rows(23))
    anchors = [{**row, "id": "a" + row["id"]} for row in random_rows(7, seed=5, risk=False)]
    write_jsonl(folder / "anchor.jsonl", anchors)
    config = folder / "run.yaml"
    config.write_text(
        f"model: {folder / 'policy'}\n"
        f"reference: {{model: {folder / 'reference'}}}\n"
        f"data: {{train: {folder / 'train.jsonl'}, validation: {folder / 'train.jsonl'}, "
        f"anchor: {folder / 'anchor.jsonl'}, anchor_fraction: 0.25}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "regularizer: {schedule: threshold, threshold: 0.3, ceiling: 0.8}\n"
        "optimizer: {lr: 1.0e-3}\n"
        "train: {steps: 4, precision: fp32, micro_batch_size: 3, grad_accum_steps: 2, "
        "eval_every: 2, export_shard_bytes: 20000}\n"
        f"output_dir: {folder / 'out'}\n"
    )
    return config


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_first_row(folder, ledger):
    """Metrics of step 0 from the rows named in the ledger, by plain transformers in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    rows = {
        row["id"]: row
        for name in ("train.jsonl", "anchor.jsonl")
        for row in read_jsonl(folder / name)
    }
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        for name in ("policy", "reference")
    ]
    ce_sum = div_sum = loss = 0.0
    task_tokens = active_tokens = tokens = 0
    coefs, risks = [], []
    for entry in ledger:
        row = tokenize_row(rows[entry["id"]], "", tokenizer, default_id="")
        targets = [t for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logits = [m(ids).logits[0, torch.tensor(targets) - 1].numpy() for m in models]
        labels = np.array([row.input_ids[t] for t in targets])
        is_anchor = entry["estimator"] == "anchor"
        coef = 1.0 if is_anchor else threshold_schedule(rows[entry["id"]]["risk"])
        ce = oracles.cross_entropy(logits[0], labels)
        divergence = oracles.divergence(logits[0], logits[1], "forward")
        loss += (0 if is_anchor else 1 - coef) * ce.sum() + coef * divergence.sum()
        tokens += len(targets)
        if not is_anchor:
            ce_sum, task_tokens = ce_sum + ce.sum(), task_tokens + len(targets)
            risks.append(rows[entry["id"]]["risk"])
        if coef > 0:
            div_sum, active_tokens = div_sum + divergence.sum(), active_tokens + len(targets)
        coefs.append(coef)
    return {
        "loss": loss / tokens,
        "task_loss": ce_sum / task_tokens,
        "divergence": div_sum / active_tokens,
        "kl_coef_mean": np.mean(coefs),
        "kl_coef_max": max(coefs),
        "risk_mean": np.mean(risks),
        "risk_max": max(risks),
        "risky_fraction": np.mean([r >= 0.3 for r in risks]),
        "rows": len(ledger),
        "active_rows": sum(c > 0 for c in coefs),
        "reference_rows": sum(c > 0 for c in coefs),
        "response_tokens": tokens,
        "active_tokens": active_tokens,
    }


def threshold_schedule(risk):
    return 0.0 if risk < 0.3 else 0.8 * (risk - 0.3) / 0.7


def check_run(folder, out, world_size):
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert list(metrics[0]) == METRIC_KEYS
    ledger = read_jsonl(out / "ledger.jsonl")
    first = [entry for entry in ledger if entry["step"] == 0]
    assert len(first) == 6 * world_size
    for key, value in expected_first_row(folder, first).items():
        assert metrics[0][key] == pytest.approx(value, rel=1e-5), key
    assert "validation_loss" in metrics[1]
    assert "validation_loss" in metrics[3]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert verify_ledger(out).rows == len(ledger) == summary["ledger"]["rows"]
    assert list((out / "tensorboard").iterdir())
    return metrics


def without_times(metrics):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics]


def check_export(folder, out):
    """Plain `from_pretrained` gives a model that has moved, with the names it started with."""
    before = AutoModelForCausalLM.from_pretrained(folder / "policy")
    after, info = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    names = [name for name, _ in before.named_parameters()]
    assert [name for name, _ in after.named_parameters()] == names
    moved = [
        name
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert moved == names
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.chat_template == word_tokenizer().chat_template
    assert len(list((out / "model").glob("model-*.safetensors"))) > 1
    assert not list(out.glob(".*partial"))
    assert "safereg" not in (out / "model" / "config.json").read_text()


def test_every_launcher_gives_the_same_run(tmp_path, launch):
    config = make_run(tmp_path)
    runs = {}
    for launcher, ranks in (("deepspeed", 2), ("torchrun", 2), ("python", 1)):
        done = launch(FINETUNE, config, *CLIPPED, ranks=ranks, launcher=launcher)
        assert done.status == 0, done.output[-4000:]
        runs[launcher] = without_times(check_run(tmp_path, tmp_path / "out", ranks))
        check_export(tmp_path, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    assert runs["deepspeed"] == runs["torchrun"]
    single = launch(FINETUNE, config, *CLIPPED, "engine.name=single", ranks=1)
    assert single.status == 0, single.output[-4000:]
    metrics = without_times(check_run(tmp_path, tmp_path / "out", 1))
    for ours, deepspeed in zip(metrics, runs["python"], strict=True):
        assert ours == pytest.approx(deepspeed, rel=1e-5)


@pytest.mark.parametrize("family", ["falcon", "qwen", "mistral"])
def test_other_architectures(family, tmp_path, launch):
    config = make_run(tmp_path, family)
    done = launch(FINETUNE, config, "train.activation_checkpointing=true", ranks=2)
    assert done.status == 0, done.output[-4000:]
    check_run(tmp_path, tmp_path / "out", 2)
    check_export(tmp_path, tmp_path / "out")


def test_bf16_tied_and_offloaded(tmp_path, launch):
    config = make_run(tmp_path, tie_word_embeddings=True)
    done = launch(
        FINETUNE,
        config,
        "train.precision=bf16",
        "reference.offload=cpu",
        *(["engine.offload_optimizer=cpu"] if HAS_CPU_ADAM else []),
        "engine.offload_params=cpu",
        "reference.rows_per_pass=1",
        ranks=2,
    )
    assert done.status == 0, done.output[-4000:]
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    ledger = [e for e in read_jsonl(tmp_path / "out" / "ledger.jsonl") if e["step"] == 0]
    expected = expected_first_row(tmp_path, ledger)
    for key in ("loss", "task_loss", "divergence"):
        assert metrics[0][key] == pytest.approx(expected[key], rel=0.05), key
    assert metrics[-1]["validation_loss"] < metrics[1]["validation_loss"]
