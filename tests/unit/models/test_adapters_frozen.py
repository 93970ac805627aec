"""Claimed: `lora.frozen` in a run of our own, on one process: what is exported is the trained
adapter alone and the model with both merged; a resumed run gives the same bits; fingerprints, and
with them caches and stored states, hang on the frozen adapter's weights and scaling; stored states
are those of the pass through the policy; what cannot work is refused in one line.

Losses and gradients against float64 are `test_stacks`'. Exact: bits of a resumed run, texts.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapted import IDS, rows_of
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM

from safereg_dist import build_run, optimizer_step, prepare, start_backend
from safereg_dist.cli import main as safereg
from safereg_dist.config import config_from_dict
from safereg_dist.errors import ConfigError, ProbeError
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe

PLAIN = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


def write_adapter(folder, seed=1, model=None, **how):
    """A PEFT adapter that is not zero."""
    config = LoraConfig(**{**PLAIN, "init_lora_weights": False, **how}, task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_model() if model is None else model, config)
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    """A model, rows and an earlier adapter."""
    save_model(tmp_path / "model", tiny_model())
    write_jsonl(tmp_path / "rows.jsonl", random_rows(40))
    write_adapter(tmp_path / "aligned", lora_dropout=0.5)
    return tmp_path


def settings(folder, *, reference=None, **lora):
    frozen = {"aligned": str(folder / "aligned")}
    return {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "rows.jsonl")},
        "reference": {"adapter": "aligned"} if reference is None else reference,
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "regularizer": {"ceiling": 0.7, "threshold": 0.5},
        "optimizer": {"lr": 0.05, "warmup_ratio": 0},
        "train": {"micro_batch_size": 4, "precision": "fp32", "steps": 6, "save_every": 3},
        "engine": {"name": "single"},
        "lora": {"rank": 4, "targets": ["q_proj", "v_proj"], "frozen": frozen, **lora},
        "output_dir": str(folder / "run"),
    }


def built(chosen):
    config = config_from_dict(chosen)
    return build_run(config, start_backend(config))


def trained(folder, chosen, **changes):
    """The command's exit status."""
    (folder / "run.yaml").write_text(json.dumps({**chosen, **changes}))
    return safereg(["train", str(folder / "run.yaml")])


def test_export_and_resume(folder, capsys):
    chosen = settings(folder)
    assert trained(folder, chosen) == 0
    run = folder / "run"
    own = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {name.split(".self_attn.")[1].split(".")[0] for name in own} == {"q_proj", "v_proj"}
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    both = PeftModel.from_pretrained(base, folder / "aligned", adapter_name="aligned")
    both.load_adapter(run / "adapter", adapter_name="default")
    both.base_model.set_adapter(["aligned", "default"])
    wanted = both.eval()(input_ids=IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    alone = PeftModel.from_pretrained(tiny_model(), run / "adapter").eval()
    assert not torch.allclose(alone(input_ids=IDS).logits, wanted, atol=1e-2)

    again = folder / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "model")
    (again / "summary.json").unlink()
    assert trained(folder, chosen, output_dir=str(again)) == 0
    assert "resuming from" in capsys.readouterr().out
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors", "ledger.jsonl"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name

    (again / "summary.json").unlink()
    write_adapter(folder / "aligned", seed=2)
    assert trained(folder, chosen, output_dir=str(again)) != 0
    assert "an adapter of lora.frozen has changed" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}, {"quantize": "nf4"}])
def test_frozen_weights_stay_and_the_reference_is_where_the_policy_began(more, folder):
    if "quantize" in more:
        pytest.importorskip("bitsandbytes")
    run = built(settings(folder, **more))
    frozen = {n: p.clone() for n, p in run.model.named_parameters() if ".aligned." in n}
    assert len(frozen) == 12
    divergence = [
        optimizer_step(run, rows_of(step), step=step, lr=0.05).totals.sums["divergence_sum"]
        for step in range(2)
    ]
    assert abs(divergence[0]) < 1e-6  # a new adapter is zero
    assert divergence[1] > 1e-3
    now = dict(run.model.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())


def prints(folder, **how):
    return built(settings(folder, **how)).fingerprints


def test_fingerprints_hang_on_what_is_frozen(folder):
    base = model_fingerprint(tiny_model())
    found = prints(folder)
    assert found["reference"] == found["policy"] != base
    alone = prints(folder, reference={})
    assert alone == {"policy": found["policy"], "reference": base}
    copy = prints(folder, reference={"adapter": "aligned", "engine": "whole"})
    assert copy == found
    model = PeftModel.from_pretrained(tiny_model(), folder / "aligned", adapter_name="other")
    assert model_fingerprint(model.get_base_model(), ["other"]) == found["policy"]

    write_adapter(folder / "aligned", lora_alpha=9)  # the same weights, scaled
    scaled = prints(folder)
    write_adapter(folder / "aligned", seed=2)
    assert len({found["policy"], scaled["policy"], prints(folder)["policy"], base}) == 4


def save_probe(folder, fingerprint):
    """A probe of two layers' states."""
    weight = torch.linspace(-1, 1, 32)
    ones, zeros = torch.ones(32), torch.zeros(32)
    Probe(
        layer=2,
        pooling="last_prompt_token",
        mean=zeros,
        scale=ones,
        weight=weight,
        bias=0.0,
        threshold=0.5,
        fingerprint=fingerprint,
        meta={},
    ).save(folder)


def test_a_probe_must_belong_to_the_base_with_the_adapter(folder):
    known = prints(folder)["reference"]
    chosen = settings(folder)
    model = PeftModel.from_pretrained(tiny_model(), folder / "aligned", adapter_name="aligned")
    door = {"reference": {"adapter": "aligned"}, "train": {"precision": "fp32"}}
    for fingerprint in (model_fingerprint(tiny_model()), known):
        save_probe(folder / "probe", fingerprint)
        risk = {"estimator": "probe", "path": str(folder / "probe"), "cache": "none"}
        risk["max_held_back"] = 1.0
        if fingerprint == known:
            built({**chosen, "risk": risk})
            prepare(model, {**door, "risk": risk})
            continue
        for make in (lambda r=risk: built({**chosen, "risk": r}),
                     lambda r=risk: prepare(model, {**door, "risk": r})):  # fmt: skip
            with pytest.raises(ProbeError, match="base model with the adapter 'aligned' on"):
                make()


def test_stored_states_are_those_of_the_pass(folder, capsys):
    chosen = settings(folder)
    (folder / "run.yaml").write_text(json.dumps(chosen))
    store = folder / "store"
    assert safereg(["reference", "build", str(folder / "run.yaml"), "--out", str(store)]) == 0
    losses = {}
    for name, cache in (("off", None), ("stored", str(store))):
        reference = {"adapter": "aligned", "cache": cache}
        out = folder / name
        assert trained(folder, chosen, reference=reference, output_dir=str(out)) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows]
    assert losses["stored"] == pytest.approx(losses["off"], rel=1e-6)
    capsys.readouterr()
    write_adapter(folder / "aligned", seed=2)
    assert trained(folder, chosen, reference=reference, output_dir=str(folder / "new")) != 0
    assert "reference" in capsys.readouterr().err


def spoil(folder, what):
    """A folder with something other than a plain LoRA adapter of this model."""
    bad = folder / "bad"
    match what:
        case "empty":
            bad.mkdir()
        case "weights":
            write_adapter(bad)
            (bad / "adapter_model.safetensors").unlink()
        case "settings":
            write_adapter(bad)
            (bad / "adapter_config.json").write_text("{")
        case "kind":
            write_adapter(bad)
            (bad / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        case "wider":
            write_adapter(bad, model=tiny_model(hidden_size=64))
        case "deeper":
            write_adapter(bad, model=tiny_model(num_hidden_layers=4))
        case "rank":
            write_adapter(bad)
            facts = json.loads((bad / "adapter_config.json").read_text())
            (bad / "adapter_config.json").write_text(json.dumps({**facts, "r": 5}))
        case "targets":
            write_adapter(bad)
            facts = json.loads((bad / "adapter_config.json").read_text())
            facts["target_modules"] = ["query"]
            (bad / "adapter_config.json").write_text(json.dumps(facts))
        case "nan":
            write_adapter(bad)
            tensors = load_file(bad / "adapter_model.safetensors")
            next(iter(tensors.values()))[0] = torch.nan
            save_file(tensors, bad / "adapter_model.safetensors")
        case "dora":
            write_adapter(bad, use_dora=True)
        case "pissa":
            write_adapter(bad)
            facts = json.loads((bad / "adapter_config.json").read_text())
            facts["init_lora_weights"] = "pissa"
            (bad / "adapter_config.json").write_text(json.dumps(facts))
        case "saved":
            write_adapter(bad, modules_to_save=["lm_head"])
        case "head":
            write_adapter(bad, target_modules=["q_proj", "lm_head"])
    return str(bad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", "holds no adapter: expected adapter_config.json"),
        ("empty", "holds no adapter: expected adapter_config.json"),
        ("weights", "holds no adapter that can be read"),
        ("settings", "adapter_config.json cannot be read"),
        ("kind", "is an adapter of type IA3, expected LORA"),
        ("wider", "was trained on another model"),
        ("deeper", "the model has no model.layers.3"),
        ("rank", r"expected .*lora_A.weight of shape \(5, 32\), found \(3, 32\)"),
        ("targets", "cannot be used on LlamaForCausalLM"),
        ("nan", "is not finite"),
        ("dora", r"no plain LoRA adapter \(use_dora=true\)"),
        ("pissa", r"no plain LoRA adapter \(init_lora_weights=.pissa.\)"),
        ("saved", "no plain LoRA adapter .modules_to_save="),
        ("head", "has weights for the head"),
    ],
)
def test_a_folder_that_cannot_be_used(what, says, folder):
    bad = spoil(folder, what)
    with pytest.raises(ConfigError, match=says) as caught:
        built(settings(folder, reference={}, frozen={"other": bad}))
    text = str(caught.value)
    assert text.startswith(f"lora.frozen.other={bad}")
    assert "\n" not in text


def test_an_adapter_that_would_count_twice(folder):
    aligned = str(folder / "aligned")
    with pytest.raises(ConfigError, match=r"lora\.path and lora\.frozen\.aligned are both"):
        built(settings(folder, path=aligned))
    with pytest.raises(ConfigError, match=r"lora\.frozen\.a and lora\.frozen\.b are both"):
        built(settings(folder, reference={}, frozen={"a": aligned, "b": aligned + "/."}))


@pytest.mark.parametrize(
    ("reference", "lora", "says"),
    [
        ({"adapter": "sft"}, {}, r"reference\.adapter='sft' is none of lora\.frozen \(aligned\)"),
        ({"adapter": "default"}, {}, r"'default' is none of lora\.frozen"),
        ({"adapter": "aligned", "model": "other"}, {}, "set one of them to null"),
        ({}, {"frozen": {"default": "x"}}, "not default, which is the one that trains"),
        ({}, {"frozen": {"a.b": "x"}}, r"names an adapter 'a\.b'"),
        ({}, {"frozen": ["x"]}, r"lora\.frozen must name folders of adapters"),
        ({}, {"frozen": {"a": None}}, r"lora\.frozen must name folders of adapters"),
    ],
)
def test_names_that_cannot_be(reference, lora, says, folder):
    with pytest.raises(ConfigError, match=says):
        config_from_dict(settings(folder, reference=reference, **lora))


def test_reference_adapter_without_lora(folder):
    with pytest.raises(ConfigError, match="but lora is null"):
        built({**settings(folder), "lora": None})


def test_prepare_refuses_an_adapter_of_another_reference():
    adapted = get_peft_model(tiny_model(), LoraConfig(**PLAIN, task_type="CAUSAL_LM"))
    chosen = {"reference": {"adapter": "default"}, "risk": {"estimator": "column"}}
    with pytest.raises(ConfigError, match="stays on where the reference is the model itself"):
        prepare(adapted, chosen, reference=tiny_model())


def test_a_checkpoint_of_an_earlier_version_goes_on(folder):
    """It has no `frozen` and no manifest, and its run no frozen adapters."""
    chosen = settings(folder, reference={}, frozen={})
    assert trained(folder, chosen) == 0
    states = sorted((folder / "run" / "checkpoint").glob("*/state.json"))
    assert states
    for state in states:
        values = json.loads(state.read_text())
        assert values.pop("frozen") == ""
        state.write_text(json.dumps({**values, "format": 2}))
        state.with_name("manifest.json").unlink()
    (folder / "run" / "summary.json").unlink()
    assert trained(folder, chosen) == 0
