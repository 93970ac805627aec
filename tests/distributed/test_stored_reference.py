"""Claimed: a step from stored reference states is the step of the reference that runs, on any
number of ranks, whoever built the store; the reference's trunk is never run, nor a weight of it
gathered; rows that are not stored fall back to the trunk, counted; a killed build leaves no store.

The judge is the same step with the reference online, which `test_step_oracle` holds against
float64. Exact: counts of rows, forwards and collectives. Rounds: states of rows that were packed
otherwise: 1e-5 of the loss and of the largest entry of each gradient in float32, 1e-2 in bfloat16,
where 4e-3 was seen in gradients (and 4e-7 in the loss) between passes of one row and of four.
"""

import json
import time
from collections import Counter

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.builders import VOCAB, random_rows, save_model, tiny_model, write_jsonl
from support.launching import ROOT, kill_session, tail

from safereg_dist.cli import main as safereg
from safereg_dist.reference.store import INDEX_FILE

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
WORKER = ROOT / "tests" / "distributed" / "stored_reference_worker.py"
TOLERANCE = 1e-5
BF16 = 1e-2
HIDDEN = 32
MICRO_BATCH_SIZE, GRAD_ACCUM_STEPS = 3, 4


def write_inputs(folder):
    """Policies and references of three families, rows, anchors and a configuration."""
    for family in ("llama", "falcon", "qwen"):
        save_model(folder / family, tiny_model(family, seed=0, num_hidden_layers=2))
        save_model(folder / f"{family}-reference", tiny_model(family, seed=1, num_hidden_layers=2))
    dropping = tiny_model("llama", seed=0, num_hidden_layers=2, attention_dropout=0.2)
    save_model(folder / "llama-dropout", dropping)
    write_jsonl(folder / "train.jsonl", random_rows(40))
    anchors = random_rows(7, seed=5, risk=False)
    write_jsonl(folder / "anchor.jsonl", [{**row, "id": f"a-{row['id']}"} for row in anchors])
    (folder / "base.yaml").write_text(
        "model: llama\n"
        "reference: {rows_per_pass: 2, balance: none}\n"
        "data: {train: train.jsonl, anchor: anchor.jsonl, anchor_fraction: 0.1}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        f"train: {{precision: fp32, micro_batch_size: {MICRO_BATCH_SIZE}, "
        f"grad_accum_steps: {GRAD_ACCUM_STEPS}, chunk_tokens: 7}}\n"
        "optimizer: {max_grad_norm: 0}\n"
        "output_dir: out\n"
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, and stores that two ranks have built."""
    from support.launching import Launcher

    base = write_inputs(tmp_path_factory.mktemp("stored"))
    done = Launcher(base)(WORKER, str(base), "build", ranks=2)
    assert done.status == 0, done.output[-4000:]
    spoil(base / "stores" / "llama", base / "stores" / "spoilt")
    return base


def spoil(store, copy):
    """A copy of the store in which every state of rank 1's shard lost a bit; its table is whole."""
    copy.mkdir()
    for path in store.iterdir():
        if path.name.startswith("rank1"):
            tensors = load_file(path)
            tensors["hidden"] = tensors["hidden"] * (1 + 2**-20)
            save_file(tensors, copy / path.name)
        else:
            (copy / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_from_the_store_is_the_step_online(world_size, folder, launch):
    done = launch(WORKER, str(folder), "train", ranks=world_size)
    assert done.status == 0, done.output[-4000:]
    ranks = [json.loads((folder / f"found.rank{r}.json").read_text()) for r in range(world_size)]
    cases = [rank["cases"] for rank in ranks]
    pairs = [name.removesuffix("-stored") for name in cases[0] if name.endswith("-stored")]
    assert len(pairs) == {1: 4, 2: 6, 3: 2}[world_size]
    for name in pairs:
        online = "llama-online" if name == "high" else f"{name}-online"
        check_same_step(folder, cases, online, f"{name}-stored")
        if name == "high":
            check_misses(folder, cases)
        else:
            check_nothing_ran(cases, online, f"{name}-stored")
    for family, fingerprint in ranks[0]["fingerprints"].items():
        if f"{family}-online" in cases[0]:
            assert cases[0][f"{family}-online"]["fingerprint"] == fingerprint
    if world_size == 2:
        check_collectives(cases)
        for case in cases:
            assert "are not those that were written" in case["spoilt"]["error"]
            assert "belong to another precision" in case["stale"]["error"]


def check_same_step(folder, cases, online, stored):
    """Rows, loss and every gradient."""
    tolerance = BF16 if "bf16" in stored else TOLERANCE
    for case in cases:
        assert "error" not in case[stored], case[stored]
        a, b = case[online], case[stored]
        assert sorted(map(tuple, a["rows"])) == sorted(map(tuple, b["rows"]))
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance), stored
    a, b = (np.load(folder / f"{name}.npz") for name in (online, stored))
    assert set(a) == set(b)
    for name in a:
        worst = np.abs(b[name] - a[name]).max() / max(np.abs(a[name]).max(), 1e-6)
        assert worst < tolerance, f"{stored}: gradient of {name} is off by {worst:.2e}"


def check_nothing_ran(cases, online, stored):
    """No pass of the trunk on any rank: the policy's forwards alone."""
    for case in cases:
        assert case[stored]["rows_run"] == case[stored]["misses"] == 0
        [policy], [both] = (case[name]["forwards"].values() for name in (stored, online))
        assert policy == GRAD_ACCUM_STEPS < both
    assert sum(case[online]["rows_run"] for case in cases) > 0


def check_misses(folder, cases):
    """Rows with a risk from 0.5 to 0.8 are active in training, and not in this store."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    risk = {row["id"]: row["risk"] for row in rows}
    total = 0
    for case in cases:
        seen = case["high-stored"]
        missing = [name for name, b in seen["rows"] if b > 0 and risk.get(name, 1.0) < 0.8]
        assert seen["misses"] == seen["rows_run"] == len(missing)
        total += len(missing)
    assert total > 0
    assert any(case["high-stored"]["misses"] < case["llama-online"]["rows_run"] for case in cases)


def check_collectives(cases):
    """Beyond plain fine-tuning: one agreement of 16 bytes, and the head where any rank needs it."""
    assert cases[0]["llama-stored"]["collectives"] == cases[1]["llama-stored"]["collectives"]
    stored, plain = (Counter(cases[0][name]["collectives"]) for name in ("llama-stored", "plain"))
    assert not plain - stored
    extra = stored - plain
    most = max(sum(b > 0 for _, b in case["llama-stored"]["rows"]) for case in cases)
    heads = -(-most // MICRO_BATCH_SIZE)
    assert extra.pop("all_reduce:2") == 1
    assert list(extra.values()) == [heads], extra
    kind, size = next(iter(extra)).split(":")
    assert kind.startswith("all_gather")
    assert int(size) == VOCAB * HIDDEN


def test_a_rank_that_cannot_write_ends_the_build_on_all(folder):
    texts = [(folder / f"broken.rank{rank}").read_text() for rank in range(2)]
    for text in texts:
        assert text.startswith("CheckpointError: "), texts
        assert "rank1-00001.safetensors, got" in text, texts
    assert texts[0].startswith("CheckpointError: rank 1: ")
    assert not (folder / "broken").exists()


def test_a_killed_build_leaves_no_store_and_is_built_again(folder, launch, monkeypatch):
    process, log = launch.start(WORKER, str(folder), "slow", ranks=2)
    partial = folder / "slow.partial"
    deadline = time.monotonic() + 240
    while len(list(partial.glob("*.safetensors"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline, tail(log)
        time.sleep(0.005)
    assert process.poll() is None, tail(log)
    kill_session(process)
    assert not (folder / "slow").exists()
    assert list(partial.glob("*.safetensors"))
    assert not (partial / INDEX_FILE).exists()
    monkeypatch.chdir(folder)
    train = ["train", "base.yaml", "engine.name=single", "--dry-run"]
    for left in ("slow", "slow.partial"):
        assert safereg([*train, f"reference.cache={left}"]) == 2
    overrides = ["engine.name=single", "reference.model=llama-reference"]
    assert safereg(["reference", "build", "base.yaml", *overrides, "--out", "slow"]) == 0
    assert not partial.exists()
    assert safereg([*train, *overrides[1:], "reference.cache=slow"]) == 0
