"""Claimed: the peer of the overhead benchmark computes our loss and gradients; FLOPs on the meta
device are the products of the dimensions; rows are dealt so that every rank has its share of risky
ones; the table has its columns, from real ranks; and each claim fails where its number is bad.

Judges: our step against the peer and both against float64 NumPy (1e-5 relative, float32 sums in
another order); the count written out, to the last FLOP; counts of one launch of two ranks, exact.
No time is asserted.
"""

from dataclasses import replace
from functools import partial

import bench_overhead
import numpy as np
import pytest
import torch
from always_on import build_always_on, full_logits_loss
from bench_overhead import WORKER, check, measure
from harness import write_csv
from overhead_cases import place_rows, threshold_for
from overhead_claims import claims_of
from overhead_rows import COLUMNS, Launch, meta_flops, read_table, rows_of
from overhead_worker import Case
from plot_overhead import draw_all
from real_shapes import RealModel
from support import oracles
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.extent import FULL
from support.launching import Launcher
from tqdm import tqdm
from transformers import LlamaConfig

from safereg_dist.config import (
    Config,
    DataConfig,
    EngineConfig,
    ReferenceConfig,
    RegularizerConfig,
    RiskConfig,
    TrainConfig,
)
from safereg_dist.data import collate
from safereg_dist.factory import build_run, start_backend
from safereg_dist.trainer import optimizer_step

# The peer


@pytest.fixture
def config(tmp_path):
    for seed, name in enumerate(("policy", "reference")):
        save_model(tmp_path / name, tiny_model(seed=seed))
    return Config(
        model=str(tmp_path / "policy"),
        data=DataConfig(train=str(write_jsonl(tmp_path / "rows.jsonl", random_rows(6)))),
        reference=ReferenceConfig(model=str(tmp_path / "reference")),
        risk=RiskConfig(estimator="column"),
        regularizer=RegularizerConfig(schedule="threshold", ceiling=0.7),
        train=TrainConfig(micro_batch_size=3, grad_accum_steps=2, precision="fp32"),
        engine=EngineConfig(name="single"),
        output_dir=str(tmp_path / "run"),
    )


def step_and_grads(run, rows):
    """Sums of an optimizer step of two micro-batches, and its gradients by name."""
    grads = {}

    def keep(name, parameter):
        """What one backward gave; the engine then takes it away."""
        grads[name] = grads.get(name, 0) + parameter.grad

    for name, parameter in run.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(keep, name))
    return optimizer_step(run, rows, step=0, lr=0.0).totals.sums, grads


def test_peer_computes_our_loss_and_gradients(config):
    backend = start_backend(config)
    run = build_run(config, backend)
    rows = [run.sources.train.row(i) for i in range(6)]
    rows[4] = replace(rows[4], loss_mask=[0] * len(rows[4].input_ids))
    assert 0 < sum(row.risk >= 0.5 for row in rows) < 6
    ours, our_grads = step_and_grads(run, rows)
    theirs, their_grads = step_and_grads(build_always_on(config, backend), rows)
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert theirs["ce_sum"] == pytest.approx(ours["ce_sum"], rel=1e-5)
    assert their_grads.keys() == our_grads.keys()
    for name, grad in our_grads.items():
        scale = grad.abs().max()
        torch.testing.assert_close(their_grads[name], grad, rtol=1e-4, atol=float(1e-5 * scale))


def test_peer_runs_the_reference_on_every_row(config):
    run = build_always_on(config, start_backend(config))
    rows = [replace(run.sources.train.row(i), risk=0.0) for i in range(6)]
    done = optimizer_step(run, rows, step=0, lr=0.0)
    assert done.totals.sums["reference_rows"] == 6


def test_full_logits_loss_is_the_equation(config):
    run = build_run(config, start_backend(config))
    batch = collate([run.sources.train.row(i) for i in range(3)], pad_id=run.pad_id)
    torch.manual_seed(0)
    policy, reference = (torch.randn(*batch.input_ids.shape, 96) for _ in range(2))
    coef = [0.0, 0.4, 1.0]
    found = full_logits_loss(policy, reference, batch, coef, torch.tensor(7.0))
    flat = [x.flatten(0, 1)[batch.response_index].double().numpy() for x in (policy, reference)]
    b = np.array(coef)[batch.row_of_token.numpy()]
    ce = oracles.cross_entropy(flat[0], batch.labels.numpy())
    kl = oracles.divergence(*flat, "forward")
    assert found.loss.item() == pytest.approx(((1 - b) * ce + b * kl).sum() / 7, rel=1e-5)
    np.testing.assert_allclose(found.ce, ce, rtol=1e-5)
    np.testing.assert_allclose(found.divergence, kl, rtol=1e-5)


# FLOPs on the meta device


def test_meta_flops_are_the_products_of_the_dimensions():
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    n, responses = 24, 10
    found = meta_flops(RealModel(shape), n, responses)

    def trunk(layers, length):
        linear = 2 * length * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
        return layers * (linear + 2 * 2 * length * length * 64)

    def logits(tokens):
        return 2 * tokens * 64 * 320

    plain = 3 * trunk(4, n) + 3 * logits(responses)
    assert found["sft"] == (plain, 0)
    assert found["routed"] == (plain, trunk(4, n) + logits(responses))
    first = plain + trunk(2, n - responses)
    assert found["routed_first_epoch"] == (first, trunk(4, n) + logits(responses))
    assert found["stored"] == (plain, logits(responses))
    assert found["always_on"] == (4 * trunk(4, n) + 4 * logits(n), 0)


# Rows


@pytest.mark.parametrize(("ranks", "size"), [(2, 10), (4, 5), (3, 4)])
def test_ranks_and_micro_batches_share_risky_rows(ranks, size):
    count = 24 if ranks == 3 else 80
    dealt = [
        place_rows(count, rank=rank, world_size=ranks, micro_batch_size=size)
        for rank in range(ranks)
    ]
    assert sorted(i for rank in dealt for batch in rank for i in batch) == list(range(count))
    assert {len(batch) for rank in dealt for batch in rank} == {size}
    for risky in (0, 1, count // 20, count // 10, count // 2, count):
        by_rank = [sum(i < risky for batch in rank for i in batch) for rank in dealt]
        by_batch = [sum(i < risky for i in batch) for rank in dealt for batch in rank]
        assert max(by_rank) - min(by_rank) <= 1
        assert max(by_batch) - min(by_batch) <= 1


def test_threshold_finds_as_many_rows_as_asked():
    scores = [0.9, 0.7, 0.2]
    for risky in range(4):
        assert sum(s >= threshold_for(scores, risky) for s in scores) == risky


# Real ranks


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The table of one case on two ranks; in the full mode under the deepspeed launcher."""
    work = tmp_path_factory.mktemp("overhead")
    case = Case(
        name="tiny",
        fraction=0.25,
        num_rows=8,
        num_risky=2,
        micro_batch_size=2,
        rounds=1,
        memory_steps=1,
        arms=("sft", "routed", "always_on"),
    )
    launch = Launch(model="demo", ranks=2, cases=(case,))
    with tqdm(disable=True) as bar, pytest.MonkeyPatch.context() as patch:
        if not FULL:
            patch.setattr(bench_overhead, "_run_ranks", run_preloaded)
        measure(launch, work, bar)
    rows = list(rows_of(launch, work))
    write_csv(rows, work / "overhead.csv", COLUMNS)
    return {row["arm"]: row for row in read_table(work / "overhead.csv")}


def run_preloaded(launch, settings, results, bar):
    """The same ranks without a launcher around them."""
    log_level = {"DS_LOG_LEVEL": "error"}
    done = Launcher(settings.parent)(WORKER, settings, ranks=launch.ranks, env=log_level)
    assert done.status == 0, done.output[-4000:]
    assert all(path.is_file() for path in results)


@pytest.mark.deepspeed
def test_real_ranks_fill_the_table(measured):
    sft, routed, peer = (measured[arm] for arm in ("sft", "routed", "always_on"))
    assert (sft["flops_ratio_to_sft"], sft["safety_bytes_per_micro_batch"]) == (1, 0)
    assert sft["risk_source"] == "none"
    assert sft["time_ratio_to_sft"] is None  # nobody ran it a second time
    assert [row["reference_rows"] for row in (sft, routed, peer)] == [0, 2, 8]
    assert 1 < routed["flops_ratio_to_sft"] < 1.2 < 1.3 < peer["flops_ratio_to_sft"]
    assert 8 < routed["safety_bytes_per_micro_batch"] < peer["safety_bytes_per_micro_batch"]
    assert routed["loss"] == pytest.approx(peer["loss"], rel=1e-5)
    assert routed["loss"] != pytest.approx(sft["loss"], rel=1e-3)
    for row in (sft, routed, peer):
        assert row["peak_memory_bytes"] > 3 * 4 * 800_000 / 2  # shards of weights, two moments
        assert row["seconds"] > 0
        assert row["total_bytes"] > row["safety_bytes_per_micro_batch"]


@pytest.mark.deepspeed
def test_safety_bytes_are_what_is_beyond_plain_training(measured):
    """Two of two ranks, and two micro-batches each: all collectives are of one size on both."""
    for arm in ("routed", "always_on"):
        extra = measured[arm]["total_bytes"] - measured["sft"]["total_bytes"]
        assert extra == measured[arm]["safety_bytes_per_micro_batch"] * 2 * 2


# Claims


def table():
    """Rows in which every claim holds."""
    rows = []
    steps = [("cpu", r, "wide", 40, f) for r in (2, 4) for f in (0.0, 0.1, 1.0)]
    steps += [("cpu", 2, "wide", 512, 0.01), ("meta", 1, "Llama-3.1-8B", 100, 0.1)]
    for device, ranks, model, size, fraction in steps:
        costs = {
            "sft": 0.0,
            "routed": 0.32 * fraction,
            "routed_first_epoch": 0.05 + 0.32 * fraction,
            "stored": 0.02 * fraction,
            "always_on": 0.35,
        }
        for arm, cost in costs.items():
            row = dict.fromkeys(COLUMNS)
            row |= {"device": device, "ranks": ranks, "model": model, "rows_per_step": size}
            row |= {"risky_fraction": fraction, "arm": arm, "risk_source": "column"}
            row |= {"flops": round(1e9 * (1 + cost)), "flops_ratio_to_sft": 1 + cost}
            row |= {"layers": 2, "hidden_size": 8, "grad_accum_steps": 2, "sequence_tokens": 8}
            if device != "meta":
                row |= {"safety_bytes_per_micro_batch": 8 if fraction == 0 else 1000}
                row |= {"total_bytes": 1000, "bytes_ratio_to_sft": 1 + cost, "loss": 2.0}
            if device != "meta" and size < 512:
                row |= {"seconds": 1.0, "time_ratio_to_sft": 1 + cost, "rounds": 3}
                row |= {"time_ratio_q20": 0.98 + cost, "time_ratio_q80": 1.03 + cost}
                row |= {"peak_memory_bytes": 200 if arm == "always_on" else 100}
            rows.append(row)
    return rows


def test_good_numbers_hold(capsys):
    assert check(table(), is_whole=True)
    assert "FAIL" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "arm", "fraction", "size", "changes"),
    [
        ("0 % risky: FLOPs", "routed", 0.0, 40, {"flops_ratio_to_sft": 1.006}),
        ("0 % risky: bytes", "stored", 0.0, 40, {"safety_bytes_per_micro_batch": 17}),
        ("0 % risky: time", "routed", 0.0, 40, {"time_ratio_to_sft": 1.04}),
        ("10 % risky: FLOPs routed", "routed", 0.1, 40, {"flops_ratio_to_sft": 1.046}),
        ("10 % risky: FLOPs routed", "routed", 0.1, 100, {"flops_ratio_to_sft": 1.046}),
        ("10 % risky: FLOPs always", "always_on", 0.1, 40, {"flops_ratio_to_sft": 1.29}),
        ("100 % risky: FLOPs", "routed", 1.0, 40, {"flops": 1.36e9}),
        ("100 % risky: peak memory", "routed", 1.0, 40, {"peak_memory_bytes": 201}),
        ("10 % risky, stored", "stored", 0.1, 100, {"flops_ratio_to_sft": 1.006}),
        ("1 % risky, 512", "routed", 0.01, 512, {"bytes_ratio_to_sft": 1.06}),
        ("loss equal", "stored", 0.1, 40, {"loss": 2.0001}),
    ],
)
def test_a_bad_number_fails_its_claim_and_no_other(text, arm, fraction, size, changes, capsys):
    rows = table()
    bad = next(
        row
        for row in rows
        if (row["arm"], row["risky_fraction"], row["rows_per_step"]) == (arm, fraction, size)
    )
    bad.update(changes)
    failed = [claim.text for claim in claims_of(rows) if claim.holds is False]
    assert len(failed) == 1
    assert failed[0].startswith(text)
    assert not check(rows, is_whole=False)
    assert capsys.readouterr().out.count("FAIL") == 1


def test_what_was_not_measured_fails_a_whole_run_only(capsys):
    rows = [row for row in table() if row["device"] != "meta"]
    assert check(rows, is_whole=False)
    assert not check(rows, is_whole=True)
    assert "not measured" in capsys.readouterr().out


def test_figures_are_drawn_from_the_table(tmp_path):
    write_csv(table(), tmp_path / "overhead.csv", COLUMNS)
    draw_all(tmp_path / "overhead.csv", tmp_path / "overhead")
    names = {path.name for path in (tmp_path / "overhead").iterdir()}
    assert names == {"overhead.png", "overhead.svg", "bytes.png", "bytes.svg"}
