"""Claimed: each recipe loads, trains what it says, fits its hardware by `safereg plan`, and the
table of the README is current.

Judges: the parameter counts published with the models; LoRA's counted by hand from the sizes of the
matrices. Exact. The models are built without weights; nothing is fetched.
"""

import importlib.util
import json
import re

import pytest
import yaml
from support.builders import word_tokenizer
from support.launching import ROOT

from safereg_dist.cli import main as safereg
from safereg_dist.config import config_from_dict, config_to_yaml, load_config
from safereg_dist.data.tokenized import tokenize_row
from safereg_dist.plan.named_shapes import NAMED_SHAPES

FOLDER = ROOT / "launch" / "recipes"
PUBLISHED = {
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-3b": 3_085_938_688,
    "llama-3.2-3b": 3_212_749_824,
    "phi-3.5-mini": 3_821_079_552,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "falcon-40b": 41_303_293_952,
}


def table_module():
    spec = importlib.util.spec_from_file_location("recipes_table", FOLDER / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = table_module()


def matrices(name):
    """(in, out) of each linear layer of one decoder layer."""
    c = NAMED_SHAPES[name]
    h, heads = c["hidden_size"], c["num_attention_heads"]
    kv = c.get("num_key_value_heads", c.get("num_kv_heads")) * (h // heads)
    if c["model_type"] == "falcon":
        return [(h, h + 2 * kv), (h, h), (h, 4 * h), (4 * h, h)]
    width = c["intermediate_size"]
    if c["model_type"] == "phi3":
        return [(h, h + 2 * kv), (h, h), (h, 2 * width), (width, h)]
    return [(h, h), (h, kv), (h, kv), (h, h), (h, width), (h, width), (width, h)]


def test_a_recipe_for_each_architecture():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*PUBLISHED, "hardware"}
    assert list(TABLE.hardware()) == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations(name):
    path = FOLDER / f"{name}.yaml"
    plain = load_config(path)
    assert config_from_dict(yaml.safe_load(config_to_yaml(plain))) == plain
    rule = plain.regularizer
    assert (rule.objective, rule.divergence, rule.schedule) == ("convex", "kl_forward", "step")
    assert (rule.floor, rule.ceiling, rule.granularity) == (0.0, 1.0, "sequence")
    gpus = TABLE.hardware()[name]["gpus"]
    assert plain.train.micro_batch_size * plain.train.grad_accum_steps * gpus == 64
    told = re.search(r"--nproc (\d+)", path.read_text())
    assert gpus == (int(told[1]) if told else 16)

    lora, paper = (TABLE.with_overrides(name, file) for file in ("lora", "paper"))
    for config in (lora, paper):
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (64, 16, 0)
        assert (config.optimizer.lr, config.optimizer.weight_decay) == (2e-4, 0.01)
    assert (lora.regularizer, lora.data, lora.train) == (rule, plain.data, plain.train)
    assert paper.data.anchor is None
    rule = paper.regularizer
    assert (rule.objective, rule.divergence, rule.schedule) == ("convex", "kl_forward", "linear")
    assert (rule.floor, rule.ceiling, rule.granularity) == (0.1, 0.9, "batch")
    assert (paper.train.epochs, paper.train.seed, paper.data.max_length) == (20, 3407, 2048)


def test_recipes_differ_in_what_a_model_needs():
    """Else one of them was changed alone."""
    raw = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in PUBLISHED]
    for each, name in zip(raw, PUBLISHED, strict=True):
        assert each.pop("output_dir") == f"runs/{name}"
        assert each["risk"].pop("path") == f"runs/probe-{name}"
        assert each.pop("model").split("/")[1].lower().startswith(name)
        each["data"].pop("chat_template", None)
        del each["train"]["micro_batch_size"], each["train"]["grad_accum_steps"]
    assert all(each == raw[0] for each in raw)


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_without_weights(name, tmp_path, capsys):
    fields = NAMED_SHAPES[name]
    model = TABLE.meta_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    per_layer = sum(64 * (inside + out) for inside, out in matrices(name))
    assert TABLE.lora_parameters(name) == fields["num_hidden_layers"] * per_layer

    plan = TABLE.plan_of(name, load_config(FOLDER / f"{name}.yaml"))
    words = ["plan", FOLDER / f"{name}.yaml", "--world-size", plan.settings.world_size]
    words += ["--gpu", plan.gpu.name, "--json", tmp_path / "plan.json"]
    assert safereg([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    assert found["arms"]["routed"]["gpu_bytes"] == plan.chosen.memory.gpu
    assert found["arms"]["routed"]["overhead"] == plan.overhead("routed")


def test_the_table_is_current():
    text = (FOLDER / "README.md").read_text()
    between = text.split(TABLE.BEGIN)[1].split(TABLE.END)[0]
    assert between == "\n" + TABLE.table(), "python launch/recipes/table.py"


def test_falcons_template_marks_what_the_model_says():
    tokenizer = word_tokenizer((FOLDER / "falcon.jinja").read_text())
    said = ["w1", "w2 w3", "w4 ", "w5", "w6 "]
    turns = zip(["system", *("user", "assistant") * 2], said, strict=True)
    row = tokenize_row(
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        "here",
        tokenizer,
        default_id="0",
    )
    told = zip(row.input_ids, row.loss_mask, strict=True)
    marked = tokenizer.convert_ids_to_tokens([token for token, is_marked in told if is_marked])
    assert marked == ["w4", "<eos>", "w6", "<eos>"]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w2"}], tokenize=False, add_generation_prompt=True
    )
    # No space at its end: the first word of an answer is one token with the space before it.
    assert rendered == "User: w2\n\nAssistant:"
