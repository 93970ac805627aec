"""Claimed: a Megatron layout's parameters, memory, links, FLOPs and time are right, bad input told.

Judges: the models that megatron-core builds on each rank of a layout, and its own schedule; the
published bytes of activations (Korthikanti et al. 2022) and of optimizers (Megatron-LM's table);
ranks laid out in an array; NumPy draws; a step whose time is its FLOPs. Exact but for draws.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.builders import config_fields

from safereg_dist.cli import main
from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import MFU, USABLE_MEMORY, find_gpu
from safereg_dist.plan.flops import trunk_flops
from safereg_dist.plan.length import RowsOfRun, run_length
from safereg_dist.plan.megatron.figures import layout_curve
from safereg_dist.plan.megatron.memory import fullest_stage, layer_bytes, stage_memory
from safereg_dist.plan.megatron.plan import make_layout_plan
from safereg_dist.plan.megatron.proposal import propose, remedies
from safereg_dist.plan.megatron.report import text_of
from safereg_dist.plan.megatron.stages import check_layout, parameters
from safereg_dist.plan.megatron.traffic import group_of, link_of, over, stage_traffic
from safereg_dist.plan.pipeline import Pipeline, order
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape, Module, shape_of

COUNTS = Path(__file__).with_name("megatron_counts.py")


LLAMA_70B = config_fields("llama", 128256, 8192, 28672, 80, 64, 8)
LLAMA_405B = config_fields("llama", 128256, 16384, 53248, 126, 128, 8)
SMALL = config_fields("llama", 96, 64, 160, 8, 4, 2)
QWEN2 = config_fields("qwen2", 300, 64, 96, 4, 4, 2, tie_word_embeddings=True)
QWEN3 = config_fields("qwen3", 96, 64, 96, 6, 8, 4, head_dim=16)
CASES = [
    (SMALL, {"tp": 1, "pp": 1}),
    (SMALL, {"tp": 2, "pp": 4}),
    (SMALL, {"tp": 2, "pp": 2, "vpp": 2}),
    (QWEN2, {"tp": 2, "pp": 2}),
    (QWEN2, {"tp": 1, "pp": 1}),
    (QWEN3, {"tp": 4, "pp": 3}),
    (QWEN3, {"tp": 1, "pp": 2, "vpp": 2, "ends": 1}),
]
NAMES_OF_CASES = [
    "-".join([model["model_type"], *(f"{key}{value}" for key, value in size.items())])
    for model, size in CASES
]


def layout(**sizes):
    """Settings of a Megatron run, on as many ranks as the sizes need."""
    names = {
        "tp": "tensor_parallel",
        "pp": "pipeline_parallel",
        "cp": "context_parallel",
        "vpp": "virtual_pipeline",
        "ends": "ends_as_layers",
    }
    ranks = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1) * sizes.pop("dp", 1)
    values = {"engine": "megatron", "world_size": ranks, "gpus_per_node": 8, "grad_accum": 8}
    values |= {"micro_batch": 1, "seq_length": 64}
    return Settings(**{**values, **{names.get(key, key): value for key, value in sizes.items()}})


@pytest.fixture(scope="module")
def built():
    """What megatron-core builds on the ranks of `CASES`."""
    cases = []
    for model, size in CASES:
        padded = -(-model["vocab_size"] // (128 * size["tp"])) * 128 * size["tp"]
        cases.append((model, {**size, "vocab": padded}))
    command = [sys.executable, str(COUNTS), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES_OF_CASES)
def test_parameters_of_each_rank_are_those_that_megatron_builds(built, case):
    model, size = CASES[case]
    settings = layout(**size, gpus_per_node=size["tp"])
    for stage, found in enumerate(built[case]):
        planned = parameters(shape_of(model, where=""), settings, stage)
        assert {k: v for k, v in planned.items() if v} == found["parameters"]


@pytest.mark.slow
def test_orders_are_those_of_megatron_s_table(built):
    for (_, size), ranks in zip(CASES, built, strict=True):
        pipeline = Pipeline(stages=size["pp"], chunks=size.get("vpp", 1), micro_batches=8)
        for stage, found in enumerate(ranks):
            own = order(pipeline, stage)
            assert pipeline.warmup(stage) == found["warmup"]
            assert all(work.is_forward for work in own[: found["warmup"]])
            forwards = [(w.micro_batch, w.place // size["pp"]) for w in own if w.is_forward]
            if "vpp" in size:
                assert forwards == [tuple(entry) for entry in found["table"]]
            else:
                assert forwards == [(batch, 0) for batch in range(8)]


# ---- memory

GPT = ModelShape(
    model_type="gpt",
    hidden_size=512,
    num_layers=16,
    vocab_size=1024,
    attention_width=512,
    key_value_width=512,
    mlp_width=2048,
    num_chosen=1,
    num_heads=8,
    keeps_scores=False,
    is_tied=False,
    modules=tuple(
        Module(layer=layer, part="layers", numels=(n,), used=n, products=n, split=n)
        for layer in range(16)
        for n in (4 * 512 * 512, 8 * 512 * 512)
    ),
)
"""The transformer of the literature: an MLP of 4 H without a gate, as many keys as queries."""


@pytest.mark.parametrize(
    ("t", "spread"), [(1, False), (2, False), (8, False), (2, True), (8, True)]
)
def test_activations_are_those_published(t, spread):
    """Korthikanti et al. 2022, table 2, with selective recompute: s b h (10 + 24 / t), with
    sequence parallelism s b h 34 / t; without the 2 (or 2 / t) bytes of dropout masks."""
    settings = layout(tp=t, sequence_parallel=spread)
    published = 34 / t if spread else 10 + 24 / t
    masks = 2 / t if spread else 2
    assert layer_bytes(GPT, settings) == pytest.approx(512 * (published - masks), rel=1e-12)


def test_activations_of_a_stage_are_those_of_its_micro_batches_in_flight():
    """The paper's section 4.2.3: the first stage holds L layers' worth, interleaved
    L (1 + (p - 1) / (p v)); with full recompute 2 s b h a layer."""
    token = 64
    plain = stage_memory(GPT, layout(pp=4), 0)["activations"]
    assert plain == pytest.approx(16 * token * layer_bytes(GPT, layout(pp=4)))
    chunks = stage_memory(GPT, layout(pp=4, vpp=2), 0)["activations"]
    assert chunks == pytest.approx(plain * (1 + 3 / 8))
    last = stage_memory(GPT, layout(pp=4), 3)["activations"]
    assert last == pytest.approx(plain / 4)
    full = stage_memory(GPT, layout(pp=4, activation_checkpointing=True), 0)["activations"]
    one_layer = token * layer_bytes(GPT, layout(pp=4))
    assert full == pytest.approx(16 * token * 2 * 512 + one_layer)


@pytest.mark.parametrize(
    ("precision", "whole", "spread"), [("bf16", 18, 6 + 12 / 8), ("fp32", 16, 8 + 8 / 8)]
)
def test_bytes_a_parameter_are_those_of_megatron_s_table(precision, whole, spread):
    """Megatron-LM, docs/dist_optimizer: bf16 weights, float32 gradients 18, or 6 + 12 / d."""
    for is_spread in (False, True):
        own = layout(
            tp=2, cp=2, dp=4, precision=precision, distributed_optimizer=is_spread, arm="sft"
        )
        found = stage_memory(GPT, own, 0)
        held = sum(parameters(GPT, own, 0).values())
        size = sum(found[part] for part in ("weights", "gradients", "optimizer"))
        assert size / held == pytest.approx(spread if is_spread else whole)
        assert found["reference weights"] == 0


def test_the_reference_adds_its_weights_and_its_states():
    routed = layout(pp=2, micro_batch=2, risky_fraction=1.0)
    plain = layout(pp=2, micro_batch=2, arm="sft")
    for stage in (0, 1):
        with_it, without = (stage_memory(GPT, s, stage) for s in (routed, plain))
        assert with_it["reference weights"] == without["weights"]
        kept = 8 * 2 * 64 * 512 * 2  # micro-batches, rows, tokens, states, bytes
        assert with_it["kept reference states"] == (kept if stage == 1 else 0)
    few = layout(pp=2, micro_batch=2, risky_fraction=1.0, keep_bytes=1000)
    assert stage_memory(GPT, few, 1)["kept reference states"] == 1000


# ---- links

NAMES = ("tensor", "context", "data", "pipeline")


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 8, "pp": 2, "dp": 2},
        {"tp": 2, "cp": 2, "pp": 2, "dp": 4},
        {"tp": 4, "cp": 4, "dp": 2},
        {"tp": 1, "pp": 4, "dp": 2},
    ],
    ids=str,
)
def test_groups_lie_where_their_ranks_do(sizes):
    """Ranks as megatron-core numbers them; a ring's hops that leave the node carry that share."""
    own = layout(**sizes)
    t, c, d, p = (sizes.get(name, 1) for name in ("tp", "cp", "dp", "pp"))
    ranks = np.arange(p * d * c * t).reshape(p, d, c, t)
    groups = {
        name: np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis])
        for name, axis in zip(NAMES, (3, 2, 1, 0), strict=True)
    }
    groups["optimizer"] = (
        np.moveaxis(ranks, 3, 0).reshape(t * p, d * c, order="C") if p == 1 else None
    )
    for name, members in groups.items():
        if members is None:
            continue
        size, stride = group_of(name, own)
        assert members.shape[1] == size
        assert (np.diff(members) == stride).all()
        nodes = members // 8
        leaves = np.mean(nodes != np.roll(nodes, -1, axis=1))
        moved = over(own, name, 1.0)
        assert moved.between == pytest.approx(leaves)
        assert moved.inside == pytest.approx(1 - leaves)
        if size > 1:
            words = {0.0: "within a node", 1.0: "between nodes"}
            assert link_of(name, own) == words.get(float(leaves), "within and between nodes")


def test_bytes_of_a_step_written_out():
    """tensor 2 with sequence parallelism, pipeline 2, context 2, data 2: 16 ranks on two nodes.

    A micro-batch's states are [64 / 2, 1, 512] in bf16, its gather over 2 ranks brings the half.
    """
    own = layout(tp=2, pp=2, cp=2, dp=2, risky_fraction=1.0)
    state, batches, layers = 32 * 512 * 2, 8, 8
    held = 8 * 12 * 512 * 512 // 2 + 1024 * 512 // 2  # eight layers, half of a table
    for stage in (0, 1):
        found = stage_traffic(GPT, own, stage, active=8, run=8)
        total = {item: moved.total for item, moved in found.items()}
        gather = state / 2
        # Two gathers and two scatters a layer each way, and two gathers for the weights' gradients.
        assert total["tensor, layers"] == batches * layers * 10 * gather
        # Keys and values of one other rank; back, they and their gradients.
        assert total["context, keys and values"] == batches * layers * 3 * 32 * 2 * 512 * 2 / 2
        assert total["pipeline, states"] == batches * state / 2
        assert total["data, gradients"] == 4 * held * 3 / 4
        assert total["data, weights"] == 2 * held * 3 / 4
        assert total["reference: tensor"] == batches * (layers * 4 + (stage == 0)) * gather
        assert total["reference: pipeline"] == (batches * state / 2 if stage == 1 else 0)
        # One word of flags and four sums of each of two replicas, summed over 16 ranks.
        assert total["agreement"] == 2 * 8 * 5 * 2 * 15 / 16
        assert total["weights of tokens"] == (batches * 12 * 64 if stage == 1 else 0)
        if stage == 1:
            assert total["tensor, ends"] == 0  # no micro-batch has the plain head
            statistics = 36 * 16  # of the half of 32 tokens that is trained on, one other rank's
            assert total["loss of both"] == batches * (3 * gather + statistics)
    assert (
        stage_traffic(GPT, own, 0, active=0, run=0)["tensor, ends"].total == batches * 2 * state / 2
    )
    assert link_of("pipeline", own) == "between nodes"


def test_words_of_the_agreement_follow_the_micro_batches():
    few, many = (
        stage_traffic(GPT, layout(dp=2, grad_accum=count), 0, active=0, run=0)["agreement"].total
        for count in (60, 61)
    )
    assert (few, many) == (2 * 8 * 5 * 2 / 2, 2 * 8 * 6 * 2 / 2)


# ---- FLOPs, time


def test_micro_batches_with_a_risky_row_are_those_of_numpy_draws():
    own = layout(dp=16, micro_batch=4, grad_accum=12, risky_fraction=0.03)
    draws = np.random.default_rng(0).random((4000, 16, 12, 4)) < 0.03
    active = draws.any(-1).sum(-1)
    costs = make_layout_plan(GPT, own, find_gpu("H100")).arms["routed"]
    assert costs.active == pytest.approx(active.mean(), rel=0.02)
    assert costs.reference_slots == pytest.approx(active.max(1).mean(), rel=0.02)
    interleaved = layout(pp=2, vpp=2, dp=16, micro_batch=4, grad_accum=12, risky_fraction=0.03)
    costs = make_layout_plan(GPT, interleaved, find_gpu("H100")).arms["routed"]
    assert costs.run == pytest.approx((np.ceil(active / 2) * 2).mean(), rel=0.02)


def test_a_step_on_one_gpu_takes_the_time_of_its_flops():
    own, gpu = layout(risky_fraction=0.2, micro_batch=2), find_gpu("H100")
    plan = make_layout_plan(GPT, own, gpu)
    for costs in plan.arms.values():
        assert costs.seconds == pytest.approx(costs.total_flops / (MFU * gpu.flops_per_s))
    rows = 8 * 2
    trunk = rows * trunk_flops(GPT, 64)
    active = 8 * (1 - 0.8**2)
    found = plan.arms["routed"].flops
    assert found["reference trunk"] == pytest.approx(trunk * active / 8)
    head = 2 * 512 * 1024
    plain, trained = (8 - active) * 2 * 64, active * 2 * 32
    assert found["head, cross-entropy"] == pytest.approx(3 * head * (plain + trained))
    assert found["head, divergence"] == pytest.approx(head * rows * 0.2 * 32)
    assert plan.overhead("always_on")["flops"] == pytest.approx(1 / 3)


def test_the_bubble_takes_the_reference_as_far_as_it_has_room():
    gpu = find_gpu("H100")
    plan = make_layout_plan(GPT, layout(pp=4, risky_fraction=0.1, grad_accum=16), gpu)
    before, beside = (plan.arms[arm] for arm in ("routed", "bubble"))
    assert 0 < beside.reference_slots < before.reference_slots
    assert plan.overhead("bubble")["seconds"] < plan.overhead("routed")["seconds"]
    assert plan.overhead("bubble")["flops"] == plan.overhead("routed")["flops"]
    none = make_layout_plan(GPT, layout(pp=4, risky_fraction=0.0), gpu)
    assert none.overhead("routed")["seconds"] == none.overhead("bubble")["seconds"] == 0


# ---- proposals


def test_a_proposal_is_the_smallest_that_fits_and_says_why():
    shape, gpu = shape_of(LLAMA_70B, where=""), find_gpu("H100")
    values = {"engine": "megatron", "world_size": 256, "seq_length": 4096, "micro_batch": 1}
    values |= {"grad_accum": 32}
    usable = USABLE_MEMORY * gpu.memory_bytes
    settings, reasons = propose(shape, values, gpu)
    assert fullest_stage(shape, settings)[1] <= usable
    sizes = (settings.tensor_parallel, settings.pipeline_parallel, settings.context_parallel)
    assert sizes == (8, 2, 1)
    assert len(reasons) == 2
    for smaller in ({"tensor_parallel": 4}, {"pipeline_parallel": 1}):
        own = {"tensor_parallel": 8, "pipeline_parallel": 2, "context_parallel": 1, **smaller}
        assert fullest_stage(shape, Settings(**values, **own))[1] > usable
    kept, _ = propose(shape, {**values, "tensor_parallel": 4}, gpu)
    assert kept.tensor_parallel == 4
    assert kept.pipeline_parallel > 2
    _, hopeless = propose(shape, {**values, "world_size": 8}, gpu)
    assert hopeless == ("no layout fits; this one needs least",)


def test_what_helps_is_planned_itself():
    """Each change alone, then all of them, then the fewest GPUs with which they fit."""
    shape, gpu = shape_of(LLAMA_70B, where=""), find_gpu("H100")
    values = {"engine": "megatron", "world_size": 8, "seq_length": 4096, "micro_batch": 2}
    values |= {"grad_accum": 16, "tensor_parallel": 8}
    settings, reasons = propose(shape, values, gpu)
    left = remedies(shape, values, settings, gpu)
    texts = [remedy.text for remedy in left]
    assert texts[0] == "sizes left out, so that they are proposed"
    assert texts[1:3] == ["--activation-checkpointing", "--micro-batch 1 --grad-accum 32"]
    assert texts[3] == "all of these"
    assert [remedy.fits for remedy in left] == [False] * (len(left) - 1) + [True]
    recomputing = replace(settings, activation_checkpointing=True)
    assert left[1].needs_bytes == fullest_stage(shape, recomputing)[1]
    count = int(texts[-1].split()[0])
    usable = USABLE_MEMORY * gpu.memory_bytes
    own = {**values, "micro_batch": 1, "grad_accum": 32, "activation_checkpointing": True}
    del own["tensor_parallel"]
    for gpus, fits in ((count // 2, False), (count, True)):
        best, _ = propose(shape, {**own, "world_size": gpus}, gpu)
        assert (fullest_stage(shape, best)[1] <= usable) == fits
    plan = make_layout_plan(shape, settings, gpu, proposed=reasons)
    length = run_length(settings, RowsOfRun(1000, "--data-rows", None), first=2.0, later=2.0)
    assert length.steps == 1000 // 32 + 1
    text = text_of(plan, length, left=left)
    assert "32 steps, without checkpoints: 64 s, 0.1422 GPU-hours (of a plan that does" in text
    assert f"{count} GPUs and all of these" in text
    assert "not enough" in text


def test_126_layers_are_spread_with_the_ends_counted():
    shape, gpu = shape_of(LLAMA_405B, where=""), find_gpu("H100")
    values = {"engine": "megatron", "world_size": 1024, "seq_length": 4096, "micro_batch": 1}
    settings, _ = propose(shape, {**values, "grad_accum": 64}, gpu)
    assert settings.ends_as_layers
    assert settings.pipeline_parallel > 2
    plan = make_layout_plan(shape, settings, gpu)
    assert plan.fits
    assert [each.settings.world_size for each in layout_curve(plan, values, (8, 12, 2048))] == [
        8,
        2048,
    ]


# ---- input


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tp": 8}, "8 does not divide the model's 4 attention heads: choose one of 1, 2, 4"),
        ({"tp": 4}, "2 key heads"),
        ({"pp": 3}, "does not divide 8 layers: choose chunks among 1, 2, 4, 8"),
        ({"pp": 5}, "add --ends-as-layers"),
        ({"pp": 4, "vpp": 4}, "does not divide 8 layers"),
        ({"cp": 2, "seq_length": 66}, "must be a multiple of 4 = 2 x --context-parallel"),
        ({"tp": 2, "cp": 1, "seq_length": 65}, "multiple of 2"),
        ({"pp": 2, "vpp": 2, "grad_accum": 7}, "--grad-accum must be a multiple of 2"),
        ({"vpp": 2}, "expects --pipeline-parallel of at least 2"),
        ({"world_size": 8, "tp": 2, "cp": 3}, "x --context-parallel 3: the nearest are 6 and 12"),
        ({"hpz": 2, "world_size": 2}, "plans without --hpz-partition-size"),
        ({"arm": "stored"}, "has no stored reference in its plan"),
        ({"engine": "deepspeed", "world_size": 2, "cp": 2}, "plans without --context-parallel"),
        ({"engine": "horovod"}, "--engine must be one of deepspeed, megatron"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_go_together_are_told(changes, told):
    with pytest.raises(ConfigError) as caught:
        check_layout(shape_of(SMALL, where=""), layout(**changes))
    assert told in str(caught.value)


def test_experts_are_refused():
    mixtral = {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ConfigError, match="dense models, got a mixtral"):
        check_layout(shape_of(mixtral, where=""), layout())


def test_the_verb_prints_and_writes(tmp_path, capsys):
    path, out, figure = tmp_path / "config.json", tmp_path / "plan.json", tmp_path / "plan.png"
    path.write_text(json.dumps(LLAMA_70B))
    command = ["plan", "--model-config", str(path), "--engine", "megatron", "--world-size", "64"]
    command += ["--seq-length", "4096", "--micro-batch", "1", "--grad-accum", "32"]
    assert main([*command, "--json", str(out), "--figure", str(figure)]) == 0
    text = capsys.readouterr().out
    for expected in ("proposed --tensor-parallel 8: with 4", "stage 1", "idle slots", "Assumed"):
        assert expected in text
    found = json.loads(out.read_text())
    assert set(found["arms"]) == {"sft", "routed", "bubble", "always_on"}
    assert found["settings"]["tensor_parallel"] == 8
    assert figure.read_bytes().startswith(b"\x89PNG")
    given = ["--tensor-parallel", "8", "--pipeline-parallel", "8", "--context-parallel", "1"]
    assert main([*command, *given, "--reference-in-bubble", "--virtual-pipeline", "2"]) == 0
    text = capsys.readouterr().out
    assert "reference in the bubble (this plan)" in text
    assert "proposed" not in text
    assert main([*command, "--tensor-parallel", "3"]) == 2
    assert "--world-size 64 is no multiple" in capsys.readouterr().err
    assert main([*command, "--pipeline-parallel", "32"]) == 2
    assert "does not divide 80 layers" in capsys.readouterr().err
