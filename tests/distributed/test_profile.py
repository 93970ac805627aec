"""Claimed: under DeepSpeed the profile sees every collective, bills it to its part, and disturbs
none; where no row is risky the safety path moves at most 16 bytes per rank and micro-batch.

The judge of bytes counts at torch.distributed's own functions, wrapped before deepspeed is imported
(`profile_worker`); FLOPs of the head are written out. All are integers and equal; losses with and
without the profile are the same bits.
"""

import json

import pytest
import torch
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.launching import ROOT

from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.regions import SAFETY_PATH
from safereg_dist.risk.probe import Probe

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
WORKER = ROOT / "tests" / "distributed" / "profile_worker.py"
RANKS, STEPS, MICRO_BATCHES, H = 2, 3, 2, 32


def make_probe(policy):
    generator = torch.Generator().manual_seed(0)
    return Probe(
        layer=2,
        pooling="last_prompt_token",
        kind="linear",
        mean=torch.zeros(H),
        scale=torch.ones(H),
        weight=torch.randn(H, generator=generator) / H,
        bias=0.0,
        threshold=0.5,
        fingerprint=model_fingerprint(policy),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All arms of `profile_worker`, trained on two ranks."""
    from support.launching import Launcher

    base = tmp_path_factory.mktemp("profile")
    policy = tiny_model(seed=0)
    save_model(base / "policy", policy)
    make_probe(policy).save(base / "probe")
    rows = random_rows(30)
    for row in rows:
        row["risk"] = min(row["risk"], 0.99)  # none is active at a threshold of 1
    write_jsonl(base / "train.jsonl", rows)
    (base / "base.yaml").write_text(
        f"model: {base / 'policy'}\n"
        "reference: {balance: none}\n"  # the same rows in every arm
        f"data: {{train: {base / 'train.jsonl'}}}\n"
        "risk: {estimator: column, max_held_back: 1.0}\n"
        "regularizer: {ceiling: 0.8}\n"
        f"train: {{steps: {STEPS}, precision: fp32, micro_batch_size: 2, "
        f"grad_accum_steps: {MICRO_BATCHES}}}\n"
        f"profile: true\noutput_dir: {base / 'out'}\n"
    )
    done = Launcher(base)(WORKER, str(base), ranks=RANKS, timeout_s=180)
    assert done.status == 0, done.output
    return base


def profile_rows(folder, arm):
    return [json.loads(line) for line in (folder / arm / "profile.jsonl").read_text().splitlines()]


def metrics(folder, arm):
    return [json.loads(line) for line in (folder / arm / "metrics.jsonl").read_text().splitlines()]


def bytes_by_kind(rows, step):
    found = {}
    for row in rows:
        if row["step"] == step:
            for kind, count in row["bytes"].items():
                found[kind] = found.get(kind, 0) + count
    return found


@pytest.mark.parametrize("arm", ["risky", "quiet", "exchanged", "policy_probe", "sft"])
def test_bytes_are_those_of_the_calls(folder, arm):
    of_ranks = [json.loads((folder / f"{arm}.rank{r}.json").read_text()) for r in range(RANKS)]
    rows = profile_rows(folder, arm)
    for step in range(STEPS):
        called = {}
        for steps in of_ranks:
            for kind, count in steps[step].items():
                called[kind] = called.get(kind, 0) + count
        assert bytes_by_kind(rows, step) == called
        assert {"all_gather", "reduce_scatter", "all_reduce"} <= called.keys()


def safety_bytes(rows, step):
    """Per rank and micro-batch."""
    return sum(
        row["bytes_per_rank_and_micro_batch"]
        for row in rows
        if row["step"] == step and row["part"] in SAFETY_PATH
    )


def test_no_risky_row_costs_one_agreement(folder):
    column, policy = profile_rows(folder, "quiet"), profile_rows(folder, "policy_probe")
    assert all(row["active_rows"] == 0 for row in metrics(folder, "quiet"))
    assert all(row["active_rows"] == 0 for row in metrics(folder, "policy_probe"))
    for step in range(STEPS):
        assert safety_bytes(column, step) == 8 / MICRO_BATCHES  # one for the window
    for step in range(1, STEPS):  # in step 0 the drift monitor asks the reference too
        assert safety_bytes(policy, step) == 8


def test_what_is_not_the_safety_path_is_plain_fine_tuning(folder):
    quiet, sft = profile_rows(folder, "quiet"), profile_rows(folder, "sft")

    def rest(rows):
        return {
            (row["step"], row["part"]): (row["bytes"], row["flops"])
            for row in rows
            if row["part"] not in {*SAFETY_PATH, "metrics"}
        }

    assert rest(quiet) == rest(sft)


def test_risky_rows_gather_the_reference(folder):
    rows = profile_rows(folder, "risky")
    assert all(row["reference_rows"] > 0 for row in metrics(folder, "risky"))
    # In earlier steps ranks also compare the order in which ZeRO-3 runs modules.
    cost = {row["part"]: row for row in rows if row["step"] == STEPS - 1}
    assert cost["reference trunk"]["bytes"].keys() == {"all_gather"}
    head = tiny_model().lm_head.weight
    head_bytes = head.numel() * head.element_size()
    assert cost["reference head"]["bytes"]["all_gather"] % (RANKS * head_bytes) == 0
    assert cost["agreement"]["bytes"] == {"all_reduce": 8 * RANKS}


def test_head_flops_are_those_of_the_tokens_of_all_ranks(folder):
    vocab = tiny_model().config.vocab_size
    rows = profile_rows(folder, "risky")
    for step, row in enumerate(metrics(folder, "risky")):
        flops = {r["part"]: r["flops"] for r in rows if r["step"] == step}
        assert flops["head ce"] == 6 * row["response_tokens"] * vocab * H
        assert flops["head divergence"] == 2 * row["active_tokens"] * vocab * H


def test_exchange_is_billed_to_itself(folder):
    rows = profile_rows(folder, "exchanged")
    exchanged = [row["bytes"].get("all_to_all", 0) for row in rows if row["part"] == "exchange"]
    assert sum(exchanged) > 0
    assert all("all_to_all" not in row["bytes"] for row in rows if row["part"] != "exchange")
    # One number of each rank, and where one has a row to run two more, known to all.
    agreed = {"all_reduce": 8 * RANKS, "all_gather": 16 * RANKS * RANKS}
    assert all(row["reference_rows"] > 0 for row in metrics(folder, "exchanged"))
    assert all(row["bytes"] == agreed for row in rows if row["part"] == "agreement")


def test_losses_are_the_same_bits(folder):
    for key in ("loss", "task_loss", "divergence", "grad_norm"):
        with_profile = [row[key] for row in metrics(folder, "risky")]
        assert with_profile == [row[key] for row in metrics(folder, "unprofiled")]


def test_files_of_the_run_folder(folder):
    assert not list((folder / "unprofiled").glob("profile*"))
    for arm in ("risky", "sft"):
        names = {path.name for path in (folder / arm).glob("*profile*")}
        assert names == {"profile.jsonl", "profile.json", "profile.png"}
    summary = json.loads((folder / "risky" / "profile.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (STEPS, RANKS)
    parts = summary["parts"].values()
    assert sum(part["bytes_share"] for part in parts) == pytest.approx(1)
    assert summary["safety_path"]["bytes_share"] > 0
