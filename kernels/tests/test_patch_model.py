"""`patch_model` against the model's own loss, on small random models of transformers.

Float32: loss and every gradient agree to rounding. Half precision: the patched model is no further
from the float32 model than the model itself is (norm over all gradients). Exact: everything without
labels, what is saved, and what is left after `unpatch_model`.
"""

import contextlib
import copy
import inspect
import os
import pickle

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounter  # noqa: E402

from safereg_kernels import patch_model, unpatch_model  # noqa: E402

VOCAB = 101
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # logits far from uniform, so that caps and scales matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
CASES = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "gemma2_softcap": ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "cohere_scale": ("Cohere", {"logit_scale": 0.25}),
    "granite_divides": ("Granite", {"logits_scaling": 4.0}),
    "phi_bias": ("Phi", {}),
    "falcon": ("Falcon", {}),
    "mixtral_router": (
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
}


def make(case: str = "llama", **more) -> torch.nn.Module:
    name, options = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin at 0, norms at 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(rows: int = 3, tokens: int = 13, seed: int = 1) -> dict[str, torch.Tensor]:
    """Row r has 3 r padded tokens; prompts have no label, and the last row has none at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :4] = -100
    for row in range(rows):
        padded = tokens - 3 * row
        mask[row, padded:] = 0
        labels[row, padded:] = -100
    labels[-1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model, **inputs):
    """(outputs, gradient of every parameter by name), without leaving any."""
    outputs = model(**inputs)
    outputs.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return outputs, grads


def assert_same(ours, theirs, rtol: float = 2e-5) -> None:
    (outputs, grads), (expected, truth) = ours, theirs
    assert type(outputs) is type(expected)
    assert outputs.logits is None
    assert "logits" not in outputs
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=rtol, atol=1e-7)
    assert grads.keys() == truth.keys()
    scale = max(float(grad.abs().max()) for grad in truth.values())
    for name, grad in truth.items():
        assert grads[name].dtype == grad.dtype
        torch.testing.assert_close(grads[name], grad, rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_models_own(case):
    model, inputs = make(case), batch()
    patched = patch_model(copy.deepcopy(model))
    assert_same(run(patched, **inputs), run(model, **inputs))
    for items in (7, torch.tensor(7)):
        theirs = run(model, **inputs, num_items_in_batch=items)
        assert_same(run(patched, **inputs, num_items_in_batch=items), theirs)


def test_other_ways_to_call():
    model, inputs = make(), batch()
    patched = patch_model(copy.deepcopy(model))
    truth = run(model, **inputs)
    ids, labels, mask = (inputs[name] for name in ("input_ids", "labels", "attention_mask"))
    assert_same(run(patched, **inputs, ignore_index=-100), truth)

    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    ours = run(patched, input_ids=ids, attention_mask=mask, labels=labels, shift_labels=shifted)
    assert_same(ours, truth)

    others = {**inputs, "labels": torch.where(labels == -100, 5, labels), "ignore_index": 5}
    assert_same(run(patched, **others), run(model, **others))

    order = list(inspect.signature(model.forward).parameters)
    values = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    positional = [values.get(name) for name in order[: order.index("labels") + 1]]
    assert torch.equal(patched(*positional).loss, patched(**inputs).loss)

    loss, *rest = patched(**inputs, return_dict=False, use_cache=True)
    assert torch.equal(loss, patched(**inputs).loss)
    assert len(rest) == len(model(**inputs, return_dict=False, use_cache=True)) - 2

    states = patched(**inputs, output_hidden_states=True, use_cache=True)
    expected = model(**inputs, output_hidden_states=True, use_cache=True)
    assert states.keys() == expected.keys() - {"logits"}
    assert torch.equal(states.hidden_states[-1], expected.hidden_states[-1])


def test_a_batch_without_labels_that_count_is_zero():
    patched, inputs = patch_model(make()), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    outputs, grads = run(patched, **inputs)
    assert outputs.loss.item() == 0
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("case", ["llama", "gemma2_softcap", "phi_bias"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_is_no_worse_than_the_models_own(case, how):
    model, inputs = make(case), batch()
    if how == "bfloat16":
        half, around = copy.deepcopy(model).to(torch.bfloat16), contextlib.nullcontext()
        model = copy.deepcopy(half).float()
    else:
        half, around = copy.deepcopy(model), torch.autocast("cpu", torch.bfloat16)
    outputs, truth = run(model, **inputs)
    with around:
        own = run(half, **inputs)
        ours = run(patch_model(half), **inputs)

    def distance(grads):
        assert grads.keys() == truth.keys()
        return sum(float((grads[n].float() - truth[n]).square().sum()) for n in truth) ** 0.5

    assert ours[0].loss.dtype == torch.float32
    assert distance(ours[1]) <= 1.1 * distance(own[1])
    assert {n: g.dtype for n, g in ours[1].items()} == {n: g.dtype for n, g in own[1].items()}
    bound = abs(own[0].loss.item() - outputs.loss.item()) + 0.01 * outputs.loss.item()
    assert abs(ours[0].loss.item() - outputs.loss.item()) <= bound


@pytest.mark.parametrize("case", ["llama", "llama_tied"])
def test_gradient_checkpointing(case):
    model, inputs = make(case), batch()
    patched = patch_model(copy.deepcopy(model))
    patched.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(patched.train(), **inputs), run(model.train(), **inputs))


def test_frozen_head_and_frozen_trunk():
    model, inputs = make(), batch()
    for frozen in ("lm_head", "model"):
        copied = copy.deepcopy(model)
        getattr(copied, frozen).requires_grad_(False)
        patched = patch_model(copy.deepcopy(copied))
        assert_same(run(patched, **inputs), run(copied, **inputs))


def test_without_labels_nothing_changes():
    model, inputs = make(), batch()
    patched = patch_model(copy.deepcopy(model))
    del inputs["labels"]
    patched(**batch()).loss.backward()  # leaves nothing behind
    assert torch.equal(patched(**inputs).logits, model(**inputs).logits)
    kept = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    kept["return_dict_in_generate"] = True
    ours, theirs = patched.generate(**inputs, **kept), model.generate(**inputs, **kept)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))


def test_what_is_saved_and_shown_is_the_users_own_model(tmp_path):
    model = make()
    patched = patch_model(copy.deepcopy(model))
    patched(**batch()).loss.backward()
    assert patch_model(patched) is patched
    assert type(patched) is type(model)
    assert repr(patched) == repr(model)
    assert inspect.signature(patched.forward) == inspect.signature(model.forward)
    assert patched.state_dict().keys() == model.state_dict().keys()
    added = vars(patched).keys() - vars(model).keys()
    assert added == {"forward"}
    assert vars(patched.lm_head).keys() == vars(model.lm_head).keys()
    assert not patched.lm_head._forward_hooks

    patched.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded(**batch()).logits is not None

    thawed = pickle.loads(pickle.dumps(patched))
    assert thawed(**batch()).logits is not None
    assert copy.deepcopy(patched)(**batch()).logits is None


def test_copies_do_not_share():
    """A deep copy (a moving average, a reference) computes on its own weights."""
    patched = patch_model(make())
    other = copy.deepcopy(patched)
    before = patched(**batch()).loss
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(patched(**batch()).loss, before)
    torch.testing.assert_close(other(**batch()).loss.item(), torch.tensor(VOCAB).log().item())


def test_unpatch():
    model = make()
    before = vars(model).keys() - set()
    patched = patch_model(model)
    patched(**batch())
    assert unpatch_model(patched) is model
    assert vars(model).keys() == before
    assert model(**batch()).logits is not None
    assert unpatch_model(model) is model
    assert patch_model(model)(**batch()).logits is None


def test_an_error_inside_leaves_nothing_behind():
    patched = patch_model(make())
    with pytest.raises(ValueError, match="labels"):
        patched(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 5).long())
    assert patched(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, VOCAB)
    assert not patched.lm_head._forward_hooks
    assert "forward" not in vars(patched.lm_head)
    assert "_loss_function" not in vars(patched)


# ---- what is refused ---------------------------------------------------------------------------


class ScaledLinear(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_heads_that_are_not_linear():
    model = make()
    model.lm_head = ScaledLinear(32, VOCAB, bias=False)
    with pytest.raises(ValueError, match=r"ScaledLinear, expected nn\.Linear"):
        patch_model(model)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, VOCAB))
    with pytest.raises(ValueError, match=r"torch\.nn\.\S+Sequential, expected"):
        patch_model(model)
    with pytest.raises(ValueError, match="has the loss function None"):
        patch_model(torch.nn.Linear(2, 2))


def test_other_losses():
    model = make()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    with pytest.raises(ValueError, match="expected transformers' ForCausalLMLoss"):
        patch_model(model)
    assert "lambda" in model.loss_function.__name__


def subclass(forward):
    """A Llama whose forward does something with its logits."""
    return type("Mine", (transformers.LlamaForCausalLM,), {"forward": forward})


def scales(self, input_ids, labels=None, **kwargs):
    logits = self.lm_head(self.model(input_ids).last_hidden_state) * 3
    loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def own_loss(self, input_ids, labels=None, **kwargs):
    logits = self.lm_head(self.model(input_ids).last_hidden_state)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def no_loss(self, input_ids, labels=None, **kwargs):
    logits = self.lm_head(self.model(input_ids).last_hidden_state)
    return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def goes_round(self, input_ids, labels=None, **kwargs):
    hidden = self.model(input_ids).last_hidden_state
    logits = torch.nn.functional.linear(hidden, self.lm_head.weight)
    loss = self.loss_function(logits, labels, self.vocab_size)
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def twice(self, input_ids, labels=None, **kwargs):
    hidden = self.model(input_ids).last_hidden_state
    self.lm_head(hidden)
    return scales(self, input_ids, labels)


def relabels(self, input_ids, labels=None, **kwargs):
    logits = self.lm_head(self.model(input_ids).last_hidden_state)
    loss = self.loss_function(logits, labels.clone(), self.vocab_size)
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (scales, "treats logits in a way unknown here"),
        (own_loss, "does something of its own with the logits"),
        (no_loss, "has labels but does not call loss_function"),
        (goes_round, "does not call the module that get_output_embeddings names"),
        (twice, "calls its head twice"),
        (relabels, "changes the labels"),
    ],
)
def test_forwards_that_are_found_out(forward, message):
    torch.manual_seed(0)
    model = patch_model(subclass(forward)(make().config))
    ids = torch.randint(3, VOCAB, (2, 5))
    for _ in range(2):  # the second call is not trusted either
        with pytest.raises(ValueError, match=f"^Mine {message}.*call unpatch_model"):
            model(input_ids=ids, labels=ids)
    assert not model.lm_head._forward_hooks


def test_a_forward_that_was_replaced_before():
    model = make()
    model.forward = model.forward
    with pytest.raises(ValueError, match="patch the model first"):
        patch_model(model)


# ---- in its surroundings -----------------------------------------------------------------------


def test_peft_calls_the_base_models_forward():
    """PEFT keeps the model inside and calls `forward`, not the module."""

    class Adapter(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def get_base_model(self):
            return self.inner

        def forward(self, **inputs):
            return self.inner.forward(**inputs)

    model = make()
    adapter = Adapter(copy.deepcopy(model))
    assert patch_model(adapter) is adapter
    assert adapter(**batch()).logits is None
    torch.testing.assert_close(adapter(**batch()).loss, model(**batch()).loss)
    unpatch_model(adapter)
    assert adapter(**batch()).logits is not None


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # dynamo's own, which it hides
)
def test_under_torch_compile():
    model = make(num_hidden_layers=1)
    patched = patch_model(copy.deepcopy(model))
    counter = CompileCounter()
    compiled = torch.compile(patched, backend=counter)
    frames = []
    for seed in (1, 2, 3):
        inputs = batch(seed=seed)
        ours = compiled(**inputs)
        ours.loss.backward()
        grads = {name: p.grad for name, p in patched.named_parameters()}
        assert_same((ours, grads), run(model, **inputs))
        patched.zero_grad(set_to_none=True)
        del inputs["labels"]
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames[-1] == frames[0], "compiled once, not once a step"


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_three_steps_of_the_trainer(tmp_path, bf16):
    pytest.importorskip("accelerate")
    rows = [{name: t[0] for name, t in batch(rows=2, seed=seed).items()} for seed in range(12)]
    for row, tokens in zip(rows, range(5, 13), strict=False):  # unequal numbers of labels
        row["labels"][tokens:] = -100
    logs = []
    for patch in (lambda model: model, patch_model):
        model = patch(make("llama_tied"))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=bf16,
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(steps) == 3
        entries = [[entry["loss"], entry["grad_norm"]] for entry in steps]
        logs.append([*entries, [trainer.evaluate()["eval_loss"]] * 2])
        trainer.save_model(str(tmp_path / "saved"))
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        if patch is patch_model:
            if bf16:  # accelerate has put its autocast around the forward
                with pytest.raises(ValueError, match="was wrapped on this instance"):
                    unpatch_model(model)
            bare = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            assert bare(**batch()).logits is None
            assert unpatch_model(bare)(**batch()).logits is not None
    ours, theirs = torch.tensor(logs[1]), torch.tensor(logs[0])
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if bf16 else 2e-5, atol=1e-6)
