"""Claimed: a plan's parameter counts, FLOPs, activations and risky rows are right, bad input told.

Judges: an analytic count written here from the architectures' papers, the counts published with the
models, torch's FLOP counter and autograd's own saved tensors on small models, and NumPy draws.
Exact: counts, FLOPs. Rounds: activations (15 %, dropout masks and statistics are left out), draws.
"""

import json

import numpy as np
import pytest
import torch
from support.builders import config_fields
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from safereg_dist.cli import main
from safereg_dist.config import LoraConfig
from safereg_dist.errors import ConfigError
from safereg_dist.models.adapters import add_adapters
from safereg_dist.parallel.hardware import (
    CPU_RATES,
    GPUS,
    UNLISTED_RATES,
    find_gpu,
    rates_of_device,
)
from safereg_dist.plan.flops import flops, trunk_flops
from safereg_dist.plan.memory import activation_bytes, memory
from safereg_dist.plan.named_shapes import NAMED_SHAPES
from safereg_dist.plan.plan import make_plan
from safereg_dist.plan.remedies import remedies
from safereg_dist.plan.risky_rows import expected_rows, most_rows_law
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import read_shape, shape_of
from safereg_dist.plan.traffic import traffic
from safereg_dist.reference.exchange import exchange_pays

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "phi-3.5-mini": 3_821_079_552,
    "gemma-2-9b": 9_241_705_984,
    "falcon-40b": 41_303_293_952,
}
TIED = {name for name in PUBLISHED if name.startswith(("smollm2", "llama-3.2"))}
TIED |= {"qwen2.5-0.5b", "qwen2.5-3b", "gemma-2-9b", "falcon-40b"}


def analytic_count(f: dict, *, tied: bool) -> int:
    """Parameters from the sizes alone."""
    h, heads = f["hidden_size"], f["num_attention_heads"]
    head_dim = f.get("head_dim", h // heads)
    kv = f.get("num_key_value_heads", f.get("num_kv_heads"))
    q, k = heads * head_dim, kv * head_dim
    kind = f["model_type"]
    attention = h * q + 2 * h * k + q * h
    if kind == "qwen2":
        attention += q + 2 * k
    if kind.startswith("qwen3"):
        attention += 2 * head_dim
    experts = f.get("num_experts", f.get("num_local_experts", 0))
    width = f.get("moe_intermediate_size", f.get("intermediate_size", 4 * h))
    mlp = 2 * h * width if kind == "falcon" else 3 * h * width
    mlp = experts * mlp + experts * h if experts else mlp
    norms = {"falcon": 4 * h, "gemma2": 4 * h}.get(kind, 2 * h)
    final = 2 * h if kind == "falcon" else h
    layers = f["num_hidden_layers"] * (attention + mlp + norms)
    return layers + final + f["vocab_size"] * h * (1 if tied else 2)


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_parameters_are_those_published_and_those_counted_by_hand(name):
    shape = read_shape(name)
    assert shape.parameters == PUBLISHED[name]
    assert shape.parameters == analytic_count(NAMED_SHAPES[name], tied=name in TIED)
    assert shape.is_tied == (name in TIED)
    parts = [shape.part(part) for part in ("embedding", "layers", "final", "head")]
    assert sum(parts) == shape.parameters


def test_active_parameters_leave_idle_experts_out():
    shape = read_shape("mixtral-8x7b")
    idle = 32 * 6 * 3 * 4096 * 14336
    assert shape.active_parameters == PUBLISHED["mixtral-8x7b"] - idle
    dense = read_shape("llama-2-7b")
    assert dense.active_parameters == dense.parameters


SMALL = {
    "llama": config_fields("llama", 96, 64, 160, 3, 4, 2),
    "mistral": config_fields("mistral", 96, 64, 160, 3, 4, 2),
    "qwen2": config_fields("qwen2", 96, 64, 160, 3, 4, 2),
    "qwen3": config_fields("qwen3", 96, 64, 160, 3, 4, 2, head_dim=16),
    "phi3": config_fields("phi3", 96, 64, 160, 3, 4, 4, pad_token_id=0, eos_token_id=2),
    "mixtral": config_fields(
        "mixtral", 96, 64, 160, 3, 4, 2, num_local_experts=4, num_experts_per_tok=2
    ),
}


def small_model(name, dtype, attention):
    """A random model of the family."""
    config = AutoConfig.for_model(**SMALL[name])
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_flops_are_those_that_torch_counts(name):
    model = small_model(name, torch.float32, "eager")
    ids = torch.arange(37)[None] % 90
    with FlopCounterMode(display=False) as counter:
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    rotary = 2 * 37 * 8  # the angles are a product of positions and frequencies
    planned = trunk_flops(shape_of(SMALL[name], where=name), 37)
    assert counter.get_total_flops() - planned in (0, rotary)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        states.sum().backward()
    assert counter.get_total_flops() == pytest.approx(2 * forward, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_flops_with_adapters_are_those_that_torch_counts(name):
    """Of frozen weights no gradient is worked out; the head's own products are left out."""
    model = small_model(name, torch.float32, "eager")
    add_adapters(model, LoraConfig(rank=3))
    ids = torch.arange(37)[None] % 90
    with FlopCounterMode(display=False) as counter:
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        states.sum().backward()
    settings = Settings(world_size=1, seq_length=37, micro_batch=1, lora_rank=3)
    planned = flops(shape_of(SMALL[name], where=name), settings)
    assert forward == pytest.approx(planned["policy forward"], rel=0.01)
    # Autograd leaves out the gradient in the embedding's output, of frozen weights too.
    first = [
        parameter.numel()
        for path, parameter in model.named_parameters()
        if ".layers.0.self_attn." in path and "o_proj" not in path
        if path.endswith(("base_layer.weight", "lora_A.default.weight"))
    ]
    backward = counter.get_total_flops() + 2 * 37 * sum(first)
    assert backward == pytest.approx(planned["policy backward"], rel=0.001)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_activations_are_those_that_autograd_keeps(name, dtype):
    model = small_model(name, dtype, "sdpa")
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.arange(2 * 64).reshape(2, 64) % 90
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    settings = Settings(
        world_size=1,
        seq_length=64,
        micro_batch=2,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
    )
    planned = activation_bytes(shape_of(SMALL[name], where=name), settings)
    assert planned == pytest.approx(sum(kept.values()), rel=0.15)


@pytest.mark.parametrize(
    ("ranks", "rows", "accum", "risk"), [(1, 4, 1, 0.3), (7, 2, 5, 0.1), (64, 4, 2, 0.01)]
)
def test_the_fullest_rank_is_that_of_numpy_draws(ranks, rows, accum, risk):
    settings = Settings(
        world_size=ranks,
        gpus_per_node=max(8, ranks),
        micro_batch=rows,
        grad_accum=accum,
        risky_fraction=risk,
        rows_per_pass=3,
    )
    draws = np.random.default_rng(0).binomial(rows * accum, risk, (20_000, ranks)).max(1)
    expected = expected_rows(settings)
    assert most_rows_law(settings).sum() == pytest.approx(1, abs=1e-12)
    assert expected.most_rows == pytest.approx(draws.mean(), rel=0.03)
    assert expected.passes == pytest.approx(np.ceil(draws / 3).mean(), rel=0.03)
    assert expected.head_gathers == pytest.approx(np.ceil(draws / rows).mean(), rel=0.03)
    assert expected.any_risky == pytest.approx((draws > 0).mean(), abs=0.02)


def test_groups_of_kept_states_need_their_own_passes():
    settings = Settings(world_size=2, micro_batch=2, grad_accum=4, risky_fraction=1.0)
    assert expected_rows(settings).passes == 4
    few = Settings(world_size=2, micro_batch=2, grad_accum=4, risky_fraction=1.0, rows_per_pass=3)
    assert expected_rows(few).passes == 3
    assert expected_rows(few, group_batches=1).passes == 4


def test_dealt_rows_make_one_pass_where_chance_would_make_more():
    by_chance = Settings(world_size=64, micro_batch=4, grad_accum=4, risky_fraction=1 / 16)
    dealt = Settings(
        world_size=64, micro_batch=4, grad_accum=4, risky_fraction=1 / 16, balance="deal"
    )
    assert expected_rows(dealt).most_rows == 1
    assert expected_rows(by_chance).most_rows > 3


def test_overheads_keep_what_is_promised():
    shape = read_shape("llama-3.1-8b")
    plan = make_plan(shape, Settings(world_size=64, risky_fraction=0.1), find_gpu("H100"))
    assert plan.overhead("routed")["flops"] < 0.045
    assert plan.overhead("stored")["flops"] < 0.005
    assert plan.overhead("always_on")["flops"] > 0.30
    quiet = make_plan(shape, Settings(world_size=64, risky_fraction=0.0), find_gpu("H100"))
    assert quiet.overhead("routed")["flops"] == 0
    safety = quiet.arms["routed"].total_bytes - quiet.arms["sft"].total_bytes
    assert 0 < safety <= 16
    rare = Settings(world_size=8, micro_batch=4, grad_accum=16, risky_fraction=0.01)
    assert make_plan(shape, rare, find_gpu("H100")).overhead("routed")["bytes"] < 0.05


def test_bytes_of_a_ring_add_up_whatever_the_nodes():
    shape = shape_of(SMALL["llama"], where="")
    settings = {"world_size": 16, "micro_batch": 2, "risky_fraction": 1.0}
    one = traffic(shape, Settings(**settings, gpus_per_node=16))
    two = traffic(shape, Settings(**settings, gpus_per_node=8))
    for part, moved in one.items():
        assert moved.between == 0
        assert two[part].total == pytest.approx(moved.total)
        assert two[part].between == pytest.approx(moved.total / 8)


def test_the_update_is_the_fullest_moment_of_short_rows():
    """Two tokens a row, one layer whole at a time: the float32 gradients outweigh the rest."""
    settings = {"seq_length": 2, "micro_batch": 1, "arm": "sft", "activation_checkpointing": True}
    few_whole = {"reuse_distance": 1, "max_live_parameters": 1}
    shape = read_shape("llama-2-7b")
    shard = PUBLISHED["llama-2-7b"] / 8
    # A shard of weights and gradients (2 bytes each), master weights and two moments (4 each); the
    # norms whole (2 layers' and the last, of 4096); in the update the gradients in float32.
    expected = (2 + 2 + 3 * 4) * shard + 65 * 4096 * 2 + 4 * shard
    assert memory(shape, Settings(world_size=8, **settings, **few_whole)).gpu == expected
    # Of more than a sub-group, its gradients alone.
    alone = memory(shape, Settings(world_size=1, **settings, **few_whole))
    assert alone.updating == 4e9 > sum(alone.working.values())
    assert alone.gpu == 16 * PUBLISHED["llama-2-7b"] + 65 * 4096 * 2 + 4e9


# Numbers of the small Llama beyond 640, which are gathered: embedding and head, and the layers'.
SMALL_HEAD = 96 * 64
SMALL_TRUNK = 96 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)


def test_second_shards_are_gathered_over_all_ranks_once_a_step():
    shape = shape_of(SMALL["llama"], where="")
    settings = {"world_size": 16, "grad_accum": 4, "gpus_per_node": 8, "arm": "sft"}
    weights = 2 * (SMALL_TRUNK + SMALL_HEAD)  # bytes
    plain = traffic(shape, Settings(**settings))
    assert plain["parameters, first use"].total == pytest.approx(4 * weights * 15 / 16)
    assert plain["parameters, used again"].total == 0
    hpz = traffic(shape, Settings(**settings, hpz=8))
    assert hpz["parameters, first use"].total == pytest.approx(weights * 15 / 16)
    assert hpz["parameters, first use"].between == pytest.approx(weights * 15 / 16 / 8)
    assert hpz["parameters, used again"].inside == pytest.approx(3 * weights * 7 / 8)
    assert hpz["parameters, used again"].between == 0
    for name in ("gradients", "small parameters"):
        assert hpz[name] == plain[name]


def test_a_reference_that_always_runs_is_gathered_for_every_micro_batch():
    shape = shape_of(SMALL["llama"], where="")
    for risky_fraction in (0.0, 1.0):
        moved = traffic(
            shape,
            Settings(
                world_size=4, grad_accum=6, risky_fraction=risky_fraction, arm="always_on",
                probe_depth=0.5,
            ),
        )  # fmt: skip
        assert moved["reference trunk"].total == pytest.approx(6 * 2 * SMALL_TRUNK * 3 / 4)
        assert moved["reference head"].total == pytest.approx(6 * 2 * SMALL_HEAD * 3 / 4)
        assert moved["probe, first epoch"].total == moved["agreement"].total == 0


def test_remedies_name_what_fits_and_how_much_it_frees():
    shape = read_shape("llama-3.1-8b")
    plan = make_plan(shape, Settings(world_size=8, seq_length=4096), find_gpu("A100"))
    assert not plan.fits
    alone, together = remedies(plan)
    saved = [remedy.saved_bytes for remedy in alone]
    assert saved == sorted(saved, reverse=True)
    assert min(saved) > 0
    for remedy in alone:
        left = plan.chosen.memory.gpu - remedy.saved_bytes
        assert remedy.fits == (left <= plan.usable_bytes)
    assert (together is None) == any(remedy.fits for remedy in alone)
    hopeless = make_plan(shape, Settings(world_size=1, seq_length=131072), find_gpu("L4"))
    assert remedies(hopeless)[1] is None


def test_exchange_pays_by_the_equation():
    costs = {
        "rows_before": 4,
        "rows_after": 1,
        "passes_before": 2,
        "passes_after": 1,
        "tokens_per_row": 100.0,
        "trunk_parameters": 1_000_000,
        "parameter_bytes": 2,
        "rates": CPU_RATES,
    }
    saved = 3 * 2e6 * 100 / CPU_RATES.flops_per_s + 2e6 / CPU_RATES.link_bytes_per_s
    limit = int(saved * CPU_RATES.link_bytes_per_s)
    assert exchange_pays(moved_bytes=limit - 1, **costs)
    assert not exchange_pays(moved_bytes=limit + 1, **costs)


@pytest.mark.parametrize(
    ("named", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_devices_by_the_name_that_torch_gives(named, gpu):
    rates = rates_of_device(named, spans_nodes=True)
    known = find_gpu(gpu)
    assert rates.flops_per_s / known.flops_per_s == pytest.approx(0.4)
    assert rates.link_bytes_per_s / known.network_bytes_per_s == pytest.approx(0.7)


def test_unknown_devices_get_modest_rates_and_aliases_are_one_gpu_each():
    assert rates_of_device("Tesla K80", spans_nodes=False) == UNLISTED_RATES
    assert rates_of_device(None, spans_nodes=False) == CPU_RATES
    names = [alias for gpu in GPUS for alias in (gpu.name.lower(), *gpu.aliases)]
    assert len(set(names)) == len(names)
    assert find_gpu("h100 sxm") is find_gpu("H100")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"world_size": 12, "tensor_parallel": 8, "engine": "megatron"}, "8 and 16"),
        ({"world_size": 8, "tensor_parallel": 4}, "or choose --engine megatron"),
        ({"world_size": 12}, "gpus-per-node 8: the nearest are 8 and 16"),
        ({"world_size": 8, "hpz": 3}, "choose one of 1, 2, 4, 8"),
        ({"world_size": 0}, "world-size"),
        ({"world_size": 8, "risky_fraction": 1.5}, "[0.0, 1.0]"),
        ({"world_size": 8, "zero_stage": 2}, "must be 3"),
    ],
)
def test_sizes_that_do_not_divide_are_told(changes, told):
    with pytest.raises(ConfigError) as caught:
        Settings(**changes)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("{not json", "not JSON"),
        ("[1]", "must hold an object"),
        ('{"hidden_size": 8}', "model_type"),
        ('{"model_type": "vit"}', "mixtral"),
        ('{"model_type": "llama", "hidden_size": 8}', "missing: num_hidden_layers"),
        (json.dumps({**SMALL["llama"], "num_attention_heads": 5}), "not a multiple"),
        ('{"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 2}', "mamba"),
    ],
)
def test_bad_files_end_with_status_2(tmp_path, capsys, text, told):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    assert main(["plan", "--model-config", str(path), "--world-size", "8"]) == 2
    assert told in capsys.readouterr().err


def test_an_unknown_gpu_lists_the_known_ones(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL["llama"]))
    command = ["plan", "--model-config", str(path), "--world-size", "8", "--gpu", "H1000"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert all(gpu.name in error for gpu in GPUS)


def test_the_verb_prints_and_writes(tmp_path, capsys):
    path, out = tmp_path / "config.json", tmp_path / "plan.json"
    path.write_text(json.dumps(NAMED_SHAPES["mixtral-8x7b"]))
    command = ["plan", "--model-config", str(path), "--world-size", "64", "--gpu", "h200"]
    figure = tmp_path / "plan.png"
    assert main([*command, "--json", str(out), "--figure", str(figure)]) == 0
    text = capsys.readouterr().out
    for expected in ("46,702,792,704", "12,879,925,248", "between nodes", "always on", "Assumed"):
        assert expected in text
    found = json.loads(out.read_text())
    assert found["model"]["parameters"] == PUBLISHED["mixtral-8x7b"]
    assert set(found["arms"]) == {"sft", "routed", "stored", "always_on"}
    assert figure.read_bytes().startswith(b"\x89PNG")
    stored = [*command, "--stored-reference", "--json", str(out)]
    assert main(stored) == 0
    assert json.loads(out.read_text())["settings"]["arm"] == "stored"


def test_curves_of_nodes_that_no_power_of_two_divides(tmp_path):
    path, figure = tmp_path / "config.json", tmp_path / "plan.png"
    path.write_text(json.dumps(SMALL["llama"]))
    command = ["plan", "--model-config", str(path), "--world-size", "12", "--gpus-per-node", "6"]
    assert main([*command, "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
