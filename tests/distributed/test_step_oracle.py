"""Claimed: loss, parts and every gradient of one step are those of the equations, on any ranks,
under ZeRO-3 and under FSDP2; FSDP2 gathers the policy's head once for a step.

The judge is float64: hidden states from plain transformers, one row at a time and unpadded, the
loss and its gradients in hidden states and head from `oracles.step_loss`, the rest by the chain
rule. Exact: the order of collectives, the rows run. Rounds: float32
arithmetic of the model (1e-5 of the largest entry of each gradient).
"""

import json

import numpy as np
import pytest
from step_cases import RANDOM_STEPS, cases_on
from step_judge import expected, rows_of_step, whole_models
from support.builders import random_rows, save_model, tiny_experts, tiny_model, write_jsonl
from support.launching import ROOT

WORKER = ROOT / "tests" / "distributed" / "step_worker.py"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Policy, reference and configuration on disk."""
    base = tmp_path_factory.mktemp("step")
    save_model(base / "policy", tiny_model(seed=0, num_hidden_layers=2))
    save_model(base / "tied", tiny_model(seed=3, num_hidden_layers=2, tie_word_embeddings=True))
    save_model(base / "experts", tiny_experts("mixtral"))
    save_model(base / "reference", tiny_model(seed=1, num_hidden_layers=2))
    write_jsonl(base / "train.jsonl", random_rows(12))
    (base / "base.yaml").write_text(
        f"model: {base / 'policy'}\n"
        f"reference: {{model: {base / 'reference'}, rows_per_pass: 2}}\n"
        f"data: {{train: {base / 'train.jsonl'}}}\n"
        "risk: {estimator: column}\n"
        "train: {precision: fp32, micro_batch_size: 3, chunk_tokens: 7}\n"
        "optimizer: {max_grad_norm: 0}\n"
        f"output_dir: {base / 'out'}\n"
    )
    return base


@pytest.fixture(scope="module")
def models(folder):
    """Policy and reference in float64, by name of the policy."""
    return {name: whole_models(folder, name) for name in ("policy", "tied", "experts")}


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_step_equals_the_equations(engine, world_size, folder, models, launch, tmp_path):
    for file in ("policy", "tied", "experts", "reference", "base.yaml"):
        (tmp_path / file).symlink_to(folder / file)
    done = launch(WORKER, str(tmp_path), engine, ranks=world_size)
    assert done.status == 0, done.output[-4000:]
    for case in cases_on(world_size, engine):
        check_case(case, models[case.policy], world_size, tmp_path)
    if engine == "fsdp2" and world_size > 1:
        check_gathers_of_the_head(tmp_path)
    if world_size == 2:
        check_failing_rank(tmp_path)
    if world_size == 3:
        check_random_patterns(tmp_path)


def check_case(case, models, world_size, folder):
    result, grads, counts = expected(case, rows_of_step(case, world_size), models)
    written = json.loads((folder / f"{case.name}.json").read_text())
    total = written["total"]
    where = f"{case.name} on {world_size} ranks"
    assert total["loss"] == pytest.approx(result["loss"], rel=TOLERANCE), where
    task_loss = total["ce_sum"] / total["task_tokens"]
    assert task_loss == pytest.approx(result["task_loss"], rel=TOLERANCE), where
    if total["active_tokens"]:
        divergence = total["divergence_sum"] / total["active_tokens"]
        assert divergence == pytest.approx(result["divergence"], rel=TOLERANCE), where
    for name, count in counts.items():
        if case.objective == "none" and name == "reference_rows":
            count = 0
        assert total[name] == count, (where, name)
    assert written["left_gathered"] == [], where
    measured = np.load(folder / f"{case.name}.npz")
    assert set(measured) == set(grads), where
    for name, grad in grads.items():
        scale = max(np.abs(grad).max(), 1e-6)
        worst = np.abs(measured[name] - grad).max() / scale
        assert worst < TOLERANCE, f"{where}: gradient of {name} is off by {worst:.2e}"
    logs = [(folder / f"{case.name}.rank{r}.collectives").read_text() for r in range(world_size)]
    assert len(set(logs)) == 1, f"{where}: ranks made different collectives"


def check_gathers_of_the_head(folder):
    """Embedding and head are of one size: the former is gathered for each of two micro-batches."""
    for name, count in {"none-2": 2 + 1, "tied-none-2": 1}.items():
        made = (folder / f"{name}.rank0.collectives").read_text().splitlines()
        of_size = [
            line for line in made if line.startswith("all_gather") and line.endswith(":3072")
        ]
        assert len(of_size) == count, (name, made)


def check_failing_rank(folder):
    for granularity in ("sequence", "batch"):
        texts = [(folder / f"failing-{granularity}.rank{r}").read_text() for r in range(2)]
        assert all("the risk of rank 1 broke" in text for text in texts), texts


def check_random_patterns(folder):
    logs = [(folder / f"random.rank{r}").read_text() for r in range(3)]
    assert len(set(logs)) == 1, "ranks made different collectives"
    written = json.loads((folder / "random.json").read_text())
    assert written["skipped"] == -(-RANDOM_STEPS // 5)
    assert written["left_gathered"] == []
    quiet = (folder / "quiet.rank0").read_text().splitlines()
    # A step without risk: the policy's own gathers, the sum of tokens, and the one agreement.
    assert quiet.count("all_reduce:1") == 2, quiet
