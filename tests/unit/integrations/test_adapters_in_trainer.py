"""Claimed: with adapters (PEFT) the reference is the model without them, or with an earlier one:
loss and gradients are those of the equations, and a reference pass leaves the model as it was; a
probe reads the base model's states and knows its fingerprint; what is saved is PEFT's own.

The judge is float64, whole logits of a second model (see `support.adapted`); float32 rounds. Exact:
flags, dropout's generator, states and fingerprints, names in files.
"""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from support.adapted import (
    CASES,
    IDS,
    QUANTISED,
    STEPS,
    Alone,
    Case,
    adapted,
    check,
    expected,
    quantised,
    rows_of,
    settings_of,
    train,
    train_whole_logits,
)
from support.builders import tiny_model

from safereg_dist import prepare
from safereg_dist.errors import ConfigError
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.stage import RiskSource

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
PLAIN = Case("plain")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_with_adapters_equals_the_equations(case):
    found, *_ = train(case)
    check(found, expected(case), case.name)


def test_an_adapter_that_is_not_active_stays_as_it_is():
    case = next(case for case in CASES if case.name == "inactive")
    before = {n: p.clone() for n, p in adapted(case).named_parameters()}
    _, _, model = train(case)
    for name, parameter in model.named_parameters():
        is_trained = ".default." in name
        assert torch.equal(parameter, before[name]) is not is_trained, name


def state_of(model, optimizer):
    """All that a pass may change besides activations."""
    return (
        [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
        [(n, m.training) for n, m in model.named_modules()],
        list(model.active_adapters),
        model.get_model_status(),
        torch.get_rng_state().tolist(),
        json.dumps(optimizer.state_dict(), default=lambda tensor: tensor.tolist()),
    )


@pytest.mark.parametrize("reference", [None, "earlier"])
def test_a_reference_pass_leaves_the_model_as_it_was(reference):
    case = Case(
        "state",
        adapters=("default", "earlier"),
        active=("default", "earlier"),
        reference=reference,
    )
    model = adapted(case)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.base_model.model.model.layers[0].eval()
    for name, parameter in model.named_parameters():
        if ".earlier." in name:
            parameter.requires_grad_(False)  # on, and not trained
    _, regularizer, model = train(case, SteppedByAdam, model=model, steps=1)
    optimizer = SteppedByAdam.last.optimizer
    before = state_of(model, optimizer)
    states = regularizer.reference.model.hidden_states(IDS)
    assert state_of(model, optimizer) == before
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".earlier." in n)
    assert torch.equal(states, regularizer.reference.model.hidden_states(IDS))  # no dropout in it


class SteppedByAdam(Alone):
    """An engine whose optimizer has a state."""

    def make_optimizer(self):
        """AdamW."""
        type(self).last = self
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("saved", [(), ("lm_head", "embed_tokens")])
def test_a_probe_reads_the_base_model_and_knows_it(saved):
    model = adapted(Case("probe", saved=saved))
    base = tiny_model()
    own = prepare(model, settings_of(PLAIN)).reference.model
    for number in range(1, 4):
        wanted = []
        handle = base.model.layers[number - 1].register_forward_hook(
            lambda module, args, output, kept=wanted: kept.append(output)
        )
        base(input_ids=IDS)
        handle.remove()
        found = own.prefix_states(IDS, number)
        if number == 3:  # the last one is read behind the final norm, as from any reference
            wanted = [base.model.norm(wanted[0])]
        assert torch.equal(found, wanted[0]), number
    assert model_fingerprint(model.get_base_model()) == model_fingerprint(base)


# ---- a base in four or eight bits (QLoRA), which bitsandbytes runs on a CPU too


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_is_the_reference(kind, tmp_path):
    """Eight bits round the activations too, so there the dequantised judge is met to 2 %."""
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training

    base, whole = quantised(tmp_path, **QUANTISED[kind])
    base.train(kind == "nf4")  # in eval mode 4 bits may be repacked for inference
    with torch.no_grad():
        states = base.model(input_ids=IDS).last_hidden_state
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = adapted(PLAIN, base=base)
    own = prepare(model, settings_of(PLAIN)).reference.model
    assert torch.equal(own.hidden_states(IDS), states)
    found, *_ = train(PLAIN, model=model)
    policy = adapted(PLAIN, base=copy.deepcopy(whole)).double().eval()
    wanted = train_whole_logits(policy, whole.double().eval(), STEPS)
    if kind == "nf4":
        check(found, wanted, kind)
    else:
        assert found.losses == pytest.approx(wanted.losses, rel=2e-2)


def test_weights_that_are_packed_for_inference_are_refused(tmp_path):
    """As bitsandbytes leaves them after a forward in eval mode, on CPUs with AVX512-BF16."""
    pytest.importorskip("bitsandbytes")
    base, _ = quantised(tmp_path, **QUANTISED["nf4"])
    model = adapted(PLAIN, base=base)
    prepare(model, settings_of(PLAIN))
    layer = base.model.layers[0].self_attn.k_proj
    assert not layer.support_avx512bf16_for_cpu
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match=r"repacked .*k_proj for inference"):
        prepare(model, settings_of(PLAIN))


# ---- what is refused


def message(model, case=PLAIN, **how):
    """The ConfigError that `prepare` gives."""
    with pytest.raises(ConfigError) as caught:
        prepare(model, settings_of(case), **how)
    return str(caught.value)


class OfThePolicy(RiskSource):
    """A risk that is read inside the policy's forward."""

    name, reads_policy = "own", True


def test_what_cannot_work_is_refused_with_what_to_change():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    text = message(get_peft_model(tiny_model(), config))
    assert "target_modules" in text
    assert "modules_to_save" in text
    assert "get_peft_model" in message(tiny_model())
    text = message(adapted(PLAIN), Case("unknown", reference="sft"))
    assert "'sft'" in text
    assert "default" in text
    assert "risk.source=reference" in message(adapted(PLAIN), risk=OfThePolicy())


# ---- what is saved


def trained(folder):
    """A Trainer that has made two steps."""
    from datasets import Dataset
    from support.builders import word_tokenizer
    from transformers import DataCollatorForSeq2Seq, TrainingArguments

    from safereg_dist.integrations.trainer import SafeRegTrainer

    rows = []
    for row in [*rows_of(0), *rows_of(1)]:
        tokens = zip(row.input_ids, row.loss_mask, strict=True)
        labels = [token if kept else -100 for token, kept in tokens]
        rows.append({"input_ids": row.input_ids, "labels": labels, "risk": row.risk})
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=2,
        learning_rate=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = SafeRegTrainer(
        model=adapted(Case("saved", saved=("lm_head",))),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
        safereg=settings_of(PLAIN),
    )
    trainer.train()
    return trainer


def test_an_adapter_is_saved_alone_and_merged(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = trained(tmp_path / "run")
    model = trainer.model.eval()
    wanted = model(input_ids=IDS).logits
    trainer.save_model(str(tmp_path / "adapter"))
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert all("lora_" in name or name.endswith("lm_head.weight") for name in names), names
    assert "safereg" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, wanted)

    merged = model.merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged.save_pretrained(tmp_path / "merged")
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert names == set(tiny_model().state_dict())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for each in (merged, whole):
        torch.testing.assert_close(each(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
