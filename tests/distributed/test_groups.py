"""Claimed: two engines share every process group; hpZ and offload move weights, not results.

Whole runs through `train` with real processes. Exact: the number of communicators, the identity of
groups, DeepSpeed's settings, and, bit for bit, losses, gradients of every step and exported weights
with hpZ (resumed after a crash too) and with parameters offloaded: the same values are gathered
from elsewhere. Rounds: DeepSpeed's AdamW on the CPU is not torch's, and stored states come from
rows packed otherwise (1e-4 after four steps).
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.extent import HAS_CPU_ADAM
from support.launching import FINETUNE, ROOT

WORKER = ROOT / "tests" / "distributed" / "groups_worker.py"
STEPS = 4
pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


@pytest.fixture
def folder(tmp_path):
    """A policy, a wider and shallower reference of the same vocabulary, data, configuration."""
    save_model(tmp_path / "policy", tiny_model(seed=0, num_hidden_layers=2))
    # intermediate_size 10: weights of 480 numbers, whole under 10 * 48 but not under 10 * 32.
    wide = tiny_model(seed=1, hidden_size=48, intermediate_size=10, num_hidden_layers=2)
    save_model(tmp_path / "reference", wide)
    write_jsonl(tmp_path / "train.jsonl", random_rows(40))
    (tmp_path / "base.yaml").write_text(
        "model: policy\n"
        "reference: {model: reference, rows_per_pass: 2}\n"
        f"data: {{train: {tmp_path / 'train.jsonl'}}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        f"train: {{precision: fp32, micro_batch_size: 2, grad_accum_steps: 2, steps: {STEPS}}}\n"
        "optimizer: {lr: 0.01}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    return tmp_path


def test_groups_shards_and_offload_on_two_ranks(folder, launch):
    cases = "plain,routed,offloaded,stored,hpz-plain,hpz,hpz-resumed"
    if HAS_CPU_ADAM:
        cases = cases.replace("stored", "offloaded-optimizer,stored")
    run_worker(folder, launch, cases, ranks=2)
    facts = {case: facts_of(folder, case, ranks=2) for case in cases.split(",")}
    check_communicators(facts)
    check_settings(facts)
    for case in ("offloaded", "hpz", "hpz-resumed"):
        check_same_run(folder, "routed", case, ranks=2)
    check_same_run(folder, "plain", "hpz-plain", ranks=2)
    for case in facts.keys() & {"offloaded-optimizer", "stored"}:
        check_same_run(folder, "routed", case, ranks=2, tolerance=1e-4)
    assert not facts["stored"]["has_trunk"]


def test_second_shards_in_groups_of_two_among_four(folder, launch):
    run_worker(folder, launch, "routed,hpz", ranks=4)
    check_same_run(folder, "routed", "hpz", ranks=4)
    routed, hpz = (facts_of(folder, case, ranks=4) for case in ("routed", "hpz"))
    assert set(routed["gathers"]) == {"4"}
    # Backward passes, and forward passes after a step's first, gather from the neighbour alone.
    assert hpz["gathers"]["2"] > 0
    assert sum(hpz["gathers"].values()) == routed["gathers"]["4"]


def test_a_size_that_does_not_divide_is_one_message(folder, launch):
    done = launch(FINETUNE, folder / "base.yaml", "engine.hpz_partition_size=4", ranks=2)
    assert done.status == 2, done.output[-3000:]
    (message,) = [line for line in done.output.splitlines() if line.startswith("safereg: ")]
    assert "engine.hpz_partition_size to divide the number of ranks, 2, got 4" in message
    assert "choose one of 1, 2" in message
    assert not (folder / "out").exists()


def run_worker(folder, launch, cases, *, ranks):
    done = launch(WORKER, str(folder), cases, ranks=ranks)
    assert done.status == 0, done.output[-4000:]


def facts_of(folder, case, *, ranks):
    """What rank 0 saw; every rank saw the same."""
    texts = [(folder / f"{case}-{ranks}" / f"facts.rank{r}.json").read_text() for r in range(ranks)]
    assert len(set(texts)) == 1, texts
    return json.loads(texts[0])


def check_communicators(facts):
    """Those of the process and of plain ZeRO-3; hpZ adds its own, a reference none."""
    made, before = {}, None
    for case, seen in facts.items():
        made[case] = 0 if before is None else seen["communicators"] - before
        before = seen["communicators"]
    beside = made.keys() & {"routed", "offloaded", "offloaded-optimizer", "stored"}
    assert not any(made[case] for case in beside), made
    assert made["hpz"] == made["hpz-plain"] == 1, made
    for case, seen in facts.items():
        assert ("shared" in seen) == ("plain" not in case)
        if "shared" in seen:
            assert all(seen["shared"].values()), (case, seen["shared"])


def check_settings(facts):
    """Each engine's from its own hidden size: 32 and 48."""
    for case, seen in facts.items():
        policy, reference = seen["policy"], seen.get("reference")
        assert policy["hpz"] == (2 if case.startswith("hpz") else 1), case
        assert policy["offload"] == ("cpu" if case == "offloaded" else None), case
        assert (policy["threshold"], policy["prefetch"]) == (320, int(0.9 * 32 * 32))
        assert all("norm" in name for name in policy["persistent"]), policy["persistent"]
        assert not policy["waits_to_time"]  # no wait for the device before every forward
        if reference is None:
            continue
        assert reference["optimizer"] == "DeepSpeedZeRoOffload"  # none: inference
        assert (reference["hpz"], reference["secondary"]) == (1, 0), case
        assert reference["offload"] == ("cpu" if case.startswith("offloaded") else None), case
        assert (reference["threshold"], reference["prefetch"]) == (480, int(0.9 * 48 * 48))
        assert "model.layers.0.mlp.up_proj.weight" in reference["persistent"]
        assert "model.layers.0.self_attn.q_proj.weight" not in reference["persistent"]


def check_same_run(folder, one, other, *, ranks, tolerance=0.0):
    """Losses, gradients and exported weights of two runs, relative to the largest of each."""
    one, other = folder / f"{one}-{ranks}", folder / f"{other}-{ranks}"
    losses = [losses_of(run) for run in (one, other)]
    assert len(losses[0]) == len(losses[1]) == STEPS
    assert relative(*losses) <= tolerance, (other, losses)
    recorded = len(list(other.glob("grads-*.npz")))  # a resumed run has those after its crash
    assert recorded == (2 if "resumed" in other.name else STEPS)
    for index in range(recorded):
        want = np.load(one / f"grads-{STEPS - recorded + index}.npz")
        compare(want, np.load(other / f"grads-{index}.npz"), tolerance, f"{other}, step {index}")
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, other)]
    compare(*weights, tolerance, f"{other}, exported")


def losses_of(run):
    return np.array(
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    )


def compare(want, got, tolerance, where):
    assert set(want) == set(got), where
    for name in want:
        assert np.abs(want[name]).max() > 0, (where, name)
        worst = relative(want[name], got[name])
        assert worst <= tolerance, f"{where}: {name} is off by {worst:.2e}"


def relative(want, got):
    return np.abs(got - want).max() / np.abs(want).max()
