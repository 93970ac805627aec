"""Claimed: `safereg plan` takes a run's YAML, a model's name, rows of a step and rates; options win
over the YAML; what cannot be planned is told before torch is loaded; a stored reference and what
offloading costs are priced.

Judges: the settings written down here, arithmetic from the published sizes, files that the real
writer of a store has written. Exact but for the header of a file (1 %).
"""

import json
import subprocess
import sys

import pytest
import torch
from support.builders import save_model, tiny_model, write_run

from safereg_dist.cli import main
from safereg_dist.config import load_config
from safereg_dist.parallel.hardware import find_gpu
from safereg_dist.plan.named_shapes import shape_name
from safereg_dist.plan.plan import arm_costs, make_plan
from safereg_dist.plan.remedies import remedies
from safereg_dist.plan.settings import Settings, settings_of
from safereg_dist.plan.shape import read_shape
from safereg_dist.plan.stored import stored_price
from safereg_dist.reference.store import StoreIdentity
from safereg_dist.reference.store_writer import StoreWriter, begin_store, finish_store
from safereg_dist.risk.probe import Probe

SEVENTY = {"hidden": 8192, "mlp": 28672, "layers": 80, "keys": 1024, "vocabulary": 128256}
"""Llama-3.1-70B as published."""


def planned(capsys, *words, status=0):
    """The numbers of a plan, and its text; or its one line of error."""
    capsys.readouterr()
    assert main(["plan", *map(str, words), "--json", "-"]) == status
    out, err = capsys.readouterr()
    return (json.loads(out), err) if status == 0 else err


def test_a_run_is_planned_as_it_is_configured(tmp_path, capsys):
    config = write_run(
        tmp_path,
        rows=8,
        train={"micro_batch_size": 2, "grad_accum_steps": 3, "precision": "fp32"}
        | {"activation_checkpointing": True, "chunk_tokens": 64},
        engine={"hpz_partition_size": 4, "offload_optimizer": "cpu"},
        reference={"rows_per_pass": 5, "offload": "cpu", "keep_bytes": 1000},
    )
    found, text = planned(capsys, config, "--world-size", 16, "data.max_length=77")
    assert found["model"]["parameters"] == tiny_model().num_parameters()
    wanted = {
        **{"world_size": 16, "micro_batch": 2, "grad_accum": 3, "precision": "fp32"},
        **{"seq_length": 77, "activation_checkpointing": True, "chunk_tokens": 64, "hpz": 4},
        **{"offload_optimizer": "cpu", "offload_params": "none", "offload_reference": "cpu"},
        **{"rows_per_pass": 5, "keep_bytes": 1000, "balance": "deal", "arm": "routed"},
    }
    settings = found["settings"]
    assert {name: settings[name] for name in wanted} == wanted
    assert "every row has data.max_length=77 tokens" in text
    given = ("--micro-batch", 1, "--seq-length", 50, "--precision", "bf16", "--balance", "none")
    given += ("--no-activation-checkpointing", "--stored-reference", "--rows-per-step", 64)
    found, text = planned(capsys, config, "--world-size", 16, *given)
    wanted |= {"micro_batch": 1, "seq_length": 50, "precision": "bf16", "balance": "none"}
    wanted |= {"activation_checkpointing": False, "arm": "stored", "grad_accum": 4}
    assert {name: found["settings"][name] for name in wanted} == wanted
    assert "data.max_length" not in text
    plain = (config, "--world-size", 16, "regularizer.objective=none", "reference.balance=none")
    found, text = planned(capsys, *plain)
    assert found["settings"]["arm"] == "sft"
    assert "tored reference (" not in text
    told = planned(capsys, *plain, "--stored-reference", status=2)
    assert "runs no reference: leave --stored-reference out" in told


def test_the_probe_of_a_run_is_priced(tmp_path, capsys):
    folder = tmp_path / "probe"
    probe = {"estimator": "probe", "path": str(folder)}
    config = write_run(tmp_path, rows=8, risk=probe)
    found, text = planned(capsys, config, "--world-size", 8)
    assert (found["settings"]["probe_depth"], found["settings"]["balance"]) == (0.5, "none")
    later = planned(capsys, config, "--world-size", 8, "--probe-depth", 0)[0]["arms"]["routed"]
    [line] = [line for line in text.splitlines() if "after the first epoch" in line]
    assert line.split()[-2] == f"{later['seconds']:.3f}"
    assert f"no probe in {folder} yet" in text
    layers = tiny_model().config.num_hidden_layers
    sizes = {name: torch.ones(tiny_model().config.hidden_size) for name in ("mean", "scale")}
    facts = {"bias": 0.0, "threshold": 0.5, "fingerprint": "f", "pooling": "mean_prompt"}
    Probe(layer=1, weight=sizes["mean"].clone(), **sizes, **facts).save(folder)
    found, text = planned(capsys, config, "--world-size", 8)
    assert found["settings"]["probe_depth"] == 1 / layers
    assert "no probe" not in text
    found, _ = planned(capsys, config, "--world-size", 8, "risk.source=policy")
    assert found["settings"]["probe_depth"] == 0
    found, _ = planned(capsys, config, "--world-size", 8, "--probe-depth", 0.25)
    assert found["settings"]["probe_depth"] == 0.25


def test_rows_fall_on_ranks_as_training_deals_them(tmp_path, capsys):
    config = write_run(tmp_path, rows=8)
    for words, dealt in (
        ([], True),
        (["reference.balance=none"], False),
        (["regularizer.granularity=batch"], False),
        (["data.streaming=true"], False),
    ):
        loaded = load_config(config, words)
        assert loaded.deals_rows == dealt, words
        balance = settings_of(loaded, world_size=8).balance
        assert balance == ("deal" if dealt else "none"), words
    words = ("--model-config", tmp_path / "model", "--world-size", 8)
    assert planned(capsys, *words)[0]["settings"]["balance"] == "deal"
    by_probe = planned(capsys, *words, "--probe-depth", 0.5)[0]
    assert by_probe["settings"]["balance"] == "none"


def test_adapters_are_planned_as_what_is_trained(tmp_path, capsys):
    """Llama-3.1-70B by hand: rank x (in + out) of seven layers, and no copy of the reference."""
    h, mlp, keys = SEVENTY["hidden"], SEVENTY["mlp"], SEVENTY["keys"]
    sides = 2 * (h + h) + 2 * (h + keys) + 3 * (h + mlp)
    words = ("--model-config", "llama-3.1-70b", "--world-size", 16, "--activation-checkpointing")
    found, text = planned(capsys, *words, "--lora-rank", 16)
    adapters = 16 * sides * SEVENTY["layers"]
    assert f"trained: {adapters:,} of adapters of rank 16" in text
    assert found["fits"]
    assert "reference shards" not in found["arms"]["routed"]["memory"]["resting"]
    resting = found["arms"]["routed"]["memory"]["resting"]
    assert resting["Adam moments"] == pytest.approx(8 * adapters / 16, rel=1e-3)
    assert found["disk"]["checkpoint"] == 16 * adapters
    assert "reference.offload" not in text
    full = planned(capsys, *words)[0]
    assert not full["fits"]
    assert full["disk"]["checkpoint"] == 16 * full["model"]["parameters"]
    config = write_run(tmp_path, rows=8, lora={"rank": 2, "targets": ["q_proj"]})
    found, text = planned(capsys, config, "--world-size", 8)
    tiny = tiny_model().config
    assert f"{2 * 2 * tiny.hidden_size * tiny.num_hidden_layers:,} of adapters of rank 2" in text
    own = planned(capsys, config, "--world-size", 8, f"reference.model={tmp_path / 'model'}")[0]
    assert "reference shards" in own["arms"]["routed"]["memory"]["resting"]
    told = planned(capsys, config, "--world-size", 8, "lora.targets=[nothing]", status=2)
    assert "lora.targets=['nothing'] are no linear layers of a llama: it has down_proj" in told


def test_models_by_name():
    assert shape_name("meta-llama/Llama-3.1-70B-Instruct") == "llama-3.1-70b"
    assert shape_name("Qwen2.5-7B") == "qwen2.5-7b"
    assert shape_name("mistralai/Mistral-7B-Instruct-v0.3") is None  # another vocabulary
    assert shape_name("llama-3.1-80b") is None


def test_a_hub_id_is_planned_by_its_name(tmp_path, capsys):
    config = write_run(tmp_path, rows=8)
    words = (config, "--world-size", 8, "model=meta-llama/Llama-3.2-1B-Instruct")
    assert planned(capsys, *words)[0]["model"]["parameters"] == 1_235_814_400
    told = planned(capsys, config, "--world-size", 8, "model=org/other", status=2)
    assert "model=org/other is no folder here" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--world-size", "12"], "--gpus-per-node 8: the nearest are 8 and 16"),
        (["--world-size", "8", "--gpu", "H1000"], "must be one of"),
        (["--world-size", "8", "--mfu", "0"], "--mfu must be above 0"),
        (["--world-size", "8", "--link-gbps", "-1"], "--link-gbps must be above 0"),
        (["--world-size", "8", "--zero-stage", "2"], "plan with 3"),
        (
            ["--world-size", "16", "--rows-per-step", "100", "--micro-batch", "2"],
            "100 is not a multiple of 32 (--micro-batch 2 on 16 data-parallel GPUs): the nearest "
            "are 96 and 128",
        ),
        (["--world-size", "8", "--rows-per-step", "64", "--grad-accum", "2"], "leave one of"),
        (["--world-size", "8", "--model-config", "llama-3.1-80b"], "llama-3.1-70b"),
    ],
)
def test_what_cannot_be_planned_is_told_before_torch_is_loaded(words, told):
    code = (
        "import sys; from safereg_dist.cli import main; status = main(sys.argv[1:]);"
        "print(status, 'torch' in sys.modules)"
    )
    words = ["plan", "--model-config", "llama-3.1-70b", *words]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False", done.stderr
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_neither_a_run_nor_a_model(capsys):
    assert "expected a configuration or --model-config" in planned(
        capsys, "--world-size", 8, status=2
    )


def test_a_megatron_layout_takes_batch_and_length_of_a_configuration(tmp_path, capsys):
    config = write_run(tmp_path, rows=8)
    own = ("model=llama-3.2-1b", "data.max_length=512", "train.micro_batch_size=2")
    own += ("train.precision=bf16", "reference.rows_per_pass=3", "--engine", "megatron")
    found, _ = planned(capsys, config, *own, "--world-size", 8, "--rows-per-step", 64)
    layout = found["settings"]
    assert (layout["seq_length"], layout["micro_batch"], layout["precision"]) == (512, 2, "bf16")
    assert layout["grad_accum"] * 2 * 8 == 64 * layout["tensor_parallel"] * (
        layout["pipeline_parallel"] * layout["context_parallel"]
    )
    assert "every row has data.max_length=512 tokens" in " ".join(found["notes"])
    alone = ("--model-config", "llama-3.2-1b", "--world-size", 8, "--engine", "megatron")
    same = ("--seq-length", 512, "--micro-batch", 2, "--rows-per-step", 64)
    assert planned(capsys, *alone, *same)[0]["arms"] == found["arms"]
    assert "60 is not a multiple of" in planned(
        capsys, *alone, *same[:-1], 60, "--micro-batch", 16, status=2
    )


def test_rates_that_are_given_are_those_planned_with(capsys):
    words = ("--model-config", "llama-3.2-1b", "--world-size")
    one, text = planned(capsys, *words, 1, "--mfu", 0.2)
    half, _ = planned(capsys, *words, 1, "--mfu", 0.4)
    assert one["assumptions"]["mfu"] == 0.2
    assert "20% of the GPU's peak (--mfu)" in text
    for arm, costs in one["arms"].items():
        assert costs["seconds"] == pytest.approx(2 * half["arms"][arm]["seconds"])
    # So slow a network decides alone: what a rank receives over its eighth of 8 Gbit/s.
    slow, text = planned(capsys, *words, 16, "--link-gbps", 8)
    assert "(8 Gbit/s a node: --link-gbps)" in text
    moved = slow["arms"]["sft"]["bytes_per_rank"]
    between = sum(part["between"] for part in moved.values())
    assert slow["arms"]["sft"]["seconds"] == pytest.approx(between / (0.7 * 1.25e8))
    inside, text = planned(capsys, *words, 8, "--nvlink-gbps", 1)
    assert "(1 Gbit/s: --nvlink-gbps)" in text
    received = sum(p["inside"] for p in inside["arms"]["sft"]["bytes_per_rank"].values())
    assert inside["arms"]["sft"]["seconds"] == pytest.approx(received / (0.7 * 1.25e8))


def test_a_store_takes_the_disk_that_is_planned(tmp_path):
    shape = read_shape(save_model(tmp_path / "model", tiny_model()))
    settings = Settings(world_size=1, seq_length=800, response_share=0.5, risky_fraction=0.25)
    price = stored_price(make_plan(shape, settings, find_gpu("H100")), 400)
    out = tmp_path / "store"
    writer = StoreWriter(begin_store(out), 0)
    for row in range(100):  # a quarter of 400, 400 response tokens each
        writer.add(f"{row:064x}", torch.zeros(400, shape.hidden_size, dtype=torch.bfloat16))
    writer.flush()
    identity = StoreIdentity(reference="f", tokenizer="t", data=("c",), precision="bf16")
    size = finish_store(out, identity, hidden_size=shape.hidden_size, rows=100)
    assert size.rows == price.stored_rows == 100
    assert price.num_bytes == pytest.approx(size.num_bytes, rel=0.01)


def test_a_store_is_priced_by_its_passes():
    """Llama-3.1-70B on 16 H100, every row risky: products alone, of 2 M s + 4 s^2 A L a row."""
    h, s, rows = SEVENTY["hidden"], 1024, 64_000
    layer = 2 * h * h + 2 * h * SEVENTY["keys"] + 3 * h * SEVENTY["mlp"]
    row = 2 * SEVENTY["layers"] * layer * s + 4 * s**2 * h * SEVENTY["layers"]
    shape, gpu = read_shape("llama-3.1-70b"), find_gpu("H100")
    settings = Settings(world_size=16, micro_batch=8, risky_fraction=1.0, probe_depth=0.5)
    price = stored_price(make_plan(shape, settings, gpu), rows)
    assert price.flops == pytest.approx(rows * row)
    # 8 rows of 1024 tokens a GPU take longer than the trunk's weights over the network.
    assert price.seconds == pytest.approx(rows * row / (16 * 0.4 * 989e12))
    assert price.probe_seconds > 0
    assert price.num_bytes == pytest.approx(rows * (512 * h * 2 + 48))
    dry = Settings(world_size=16, micro_batch=8, risky_fraction=1.0)
    online, stored = (
        arm_costs(shape, Settings(world_size=16, micro_batch=8, risky_fraction=1.0, arm=arm), gpu)
        for arm in ("routed", "stored")
    )
    assert price.saved_seconds == pytest.approx(online.seconds - stored.seconds)
    steps = rows / (16 * 8)
    assert price.epochs == pytest.approx(price.seconds / (steps * price.saved_seconds))
    assert stored_price(make_plan(shape, dry, gpu), 2 * rows).epochs == pytest.approx(price.epochs)


def test_the_price_of_a_store_is_shown(capsys):
    words = ("--model-config", "llama-3.2-1b", "--world-size", 8, "--data-rows", 5000)
    found, hint = planned(capsys, *words)
    assert "A stored reference (--stored-reference), of 5,000 rows (--data-rows)" in hint
    stored, text = planned(capsys, *words, "--stored-reference")
    assert stored["stored"]["num_bytes"] == found["stored"]["num_bytes"]
    assert "Stored reference (`safereg reference build`)" in text
    run, price = stored["run"], stored["stored"]
    assert run["before_seconds"] == price["seconds"] + price["probe_seconds"] > 0
    assert run["gpu_seconds"] == pytest.approx(8 * (run["seconds"] + run["before_seconds"]))
    assert "with building the store" in text
    assert found["run"]["before_seconds"] == 0
    quiet, text = planned(capsys, *words, "--risky-fraction", 0)
    assert "never" in text
    assert quiet["stored"]["epochs"] is None


def test_remedies_say_what_they_add_to_a_step():
    """Offloading by hand: 30 bytes a parameter at 200 GB/s a host, 2 each way at 20 GB/s a GPU."""
    shape, gpu = read_shape("llama-3.1-70b"), find_gpu("H100")
    plan = make_plan(shape, Settings(world_size=16, micro_batch=1, grad_accum=3), gpu)
    alone = {remedy.text: remedy.added_seconds for remedy in remedies(plan)[0]}
    shard = 70_553_706_496 / 16
    update, moved = 8 * shard * 30 / 2e11, shard * 2 * (3 + 1) / 2e10
    assert alone["engine.offload_optimizer=cpu"] == pytest.approx(update + moved)
    assert alone["a stored reference (reference.cache)"] < 0
    recomputing = make_plan(
        shape,
        Settings(world_size=16, micro_batch=1, grad_accum=3, activation_checkpointing=True),
        gpu,
    )
    added = recomputing.chosen.seconds - plan.chosen.seconds
    assert alone["train.activation_checkpointing=true"] == pytest.approx(added)
    assert alone["engine.offload_params=cpu"] > alone["reference.offload=cpu"] > 0
    options = {remedy.text for remedy in remedies(plan, as_options=True)[0]}
    assert {"--offload-optimizer cpu", "--activation-checkpointing", "--stored-reference"} < options


def test_options_that_are_named_are_those_of_the_verb(capsys):
    """All remedies together, appended to the command that printed them, make the plan fit."""
    words = ("--model-config", "llama-3.1-70b", "--world-size", 16, "--seq-length", 4096)
    numbers, text = planned(capsys, *words)
    (line,) = [line for line in text.splitlines() if line.startswith("together: ")]
    assert line.startswith(f"together: {numbers['together']['text']}: ")
    assert {remedy["text"] for remedy in numbers["remedies"]} > {"--offload-optimizer cpu"}
    together = line.removeprefix("together: ").split(": ")[0].split()
    assert "It fits." in planned(capsys, *words, *together)[1]


def test_anchors_come_on_top_and_hours_are_of_the_data(tmp_path, capsys):
    config = write_run(tmp_path, rows=8)
    rows = tmp_path / "many.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 950)
    words = (config, "--world-size", 1, "--risky-fraction", 0.2, f"data.train={rows}")
    words += ("train.steps=null", "train.epochs=2", "train.grad_accum_steps=1")
    plain, text = planned(capsys, *words)
    size = plain["settings"]["micro_batch"]
    assert plain["run"]["steps"] == -(-1900 // size)
    assert "2 epochs of 950 rows (data.train)" in text
    seconds = plain["arms"]["routed"]["seconds"]
    assert plain["run"]["gpu_seconds"] == pytest.approx(seconds * plain["run"]["steps"])
    anchored, text = planned(capsys, *words, f"data.anchor={rows}", "data.anchor_fraction=0.05")
    assert plain["settings"]["risky_fraction"] == 0.2
    assert anchored["settings"]["risky_fraction"] == pytest.approx(0.05 + 0.95 * 0.2)
    assert anchored["run"]["steps"] == -(-2000 // size)
    assert "0.05 of the rows are anchors" in text


def test_a_model_larger_than_a_gpu_is_said(capsys):
    words = ("--model-config", "llama-3.1-70b", "--world-size")
    assert "load the whole model (141 GB)" in planned(capsys, *words, 64)[1]
    assert "the whole model" not in planned(capsys, *words, 64, "--gpu", "B200")[1]
