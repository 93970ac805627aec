"""Claimed: the head that the fused loss computes with is the model's own, soft caps and scales too;
a loss that the head returns comes back as it is, and outside of that the model is as it was.

Judge: the logits that transformers makes of the same hidden states. May round: float32 arithmetic.
Exact: what is refused, the loss that comes back, the logits before and after.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from safereg_dist.errors import ConfigError
from safereg_dist.policy import Policy, check_head
from safereg_dist.reference.trunk import ReferenceTrunk
from safereg_dist.types import head_of
from safereg_kernels import linear_ce_kl

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(family: str, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZE, **options)
    return AutoModelForCausalLM.from_config(config).eval()


CAPS_AND_SCALES = [
    ("llama", {}),
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 4.0}),
]


@pytest.mark.parametrize(("family", "options"), CAPS_AND_SCALES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family, options) -> None:
    model = model_of(family, **options)
    check_head(model)
    ids = torch.randint(3, 101, (2, 9))
    labels = torch.randint(101, (2, 9))
    model.get_output_embeddings().weight.data.mul_(20)  # a cap or a scale is to be seen
    want = torch.nn.functional.cross_entropy(
        model(input_ids=ids, use_cache=False).logits.flatten(0, 1), labels.flatten()
    )
    want_grads = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    head = head_of(model)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    got = linear_ce_kl(
        hidden,
        head.weight,
        labels,
        policy_bias=head.bias,
        policy_softcap=head.softcap,
        policy_logit_scale=head.scale,
        reduction="mean",
    )[0]
    got_grads = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(got_grads, want_grads, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "options"), CAPS_AND_SCALES)
def test_the_head_has_its_scale_and_cap_where_the_loss_is_computed(family, options) -> None:
    policy = Policy(model_of(family, **options))
    found = []

    def loss(hidden, probed):
        found.append(policy.head)
        return hidden.sum()

    with policy.ending_in(loss):
        policy.model(input_ids=torch.tensor([[3, 4]]), use_cache=False)
    wanted = head_of(policy.model)
    assert (found[0].scale, found[0].softcap) == (wanted.scale, wanted.softcap)


@pytest.mark.parametrize(("family", "options"), CAPS_AND_SCALES)
def test_a_loss_comes_back_as_it_is_and_logits_as_before(family, options) -> None:
    model = model_of(family, **options)
    ids = torch.randint(3, 101, (2, 9))
    before = model(input_ids=ids, use_cache=False).logits
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    policy = Policy(model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    head_before = head_of(model)

    def loss(hidden, probed):
        assert probed is None  # no layer is watched
        torch.testing.assert_close(hidden, states, rtol=0, atol=0)
        assert policy.head.weight is model.get_output_embeddings().weight
        return 1000 + hidden.float().square().sum()  # no soft cap leaves this as it is

    for _ in range(2):
        with policy.ending_in(loss):
            got = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(got, 1000 + states.float().square().sum())
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    with pytest.raises(ZeroDivisionError), policy.ending_in(lambda hidden, probed: 1 / 0):
        model(input_ids=ids, use_cache=False)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert head_of(model) == head_before


@pytest.mark.parametrize(("family", "options"), CAPS_AND_SCALES)
def test_gradients_of_a_loss_in_the_head_are_those_of_the_models_own_logits(
    family, options
) -> None:
    """With the head's cap and scale as they are said to be inside the block."""
    model = model_of(family, **options)
    model.get_output_embeddings().weight.data.mul_(20)
    ids, labels = torch.randint(3, 101, (2, 9)), torch.randint(101, (2, 9))
    want = torch.nn.functional.cross_entropy(
        model(input_ids=ids, use_cache=False).logits.flatten(0, 1), labels.flatten()
    )
    want_grads = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    head, policy = head_of(model), Policy(model)

    def loss(hidden, probed):
        return linear_ce_kl(
            hidden,
            policy.head.weight,
            labels,
            policy_bias=policy.head.bias,
            policy_softcap=head.softcap,
            policy_logit_scale=head.scale,
            reduction="mean",
        )[0]

    with policy.ending_in(loss):
        got = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got_grads = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)
    for mine, theirs in zip(got_grads, want_grads, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_loss_is_given_the_probed_layers_states(layer) -> None:
    model = model_of("llama")
    ids = torch.randint(3, 101, (2, 9))
    with torch.no_grad():
        want = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    policy, seen = Policy(model, probed_layer=layer), []

    def loss(hidden, probed):
        seen.append(probed)
        return hidden.sum()

    with policy.ending_in(loss):
        model(input_ids=ids, use_cache=False)
    assert torch.equal(seen[0], want[layer])
    assert not seen[0].requires_grad


@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_that_is_not_there_is_refused(layer) -> None:
    with pytest.raises(ConfigError, match=rf"reads layer {layer}, the policy has layers 1 to 2"):
        Policy(model_of("llama"), probed_layer=layer)


def test_an_unknown_treatment_of_logits_is_refused() -> None:
    model = model_of("llama")
    model.config.logits_soft_cap = 30.0
    with pytest.raises(ConfigError, match="logits_soft_cap=30"):
        check_head(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral", "cohere", "granite"])
def test_the_references_pass_never_asks_whether_rows_are_packed(family, monkeypatch) -> None:
    """That question is answered on the host, which would wait for the device."""
    model = model_of(family)
    ids = torch.randint(3, 101, (3, 17))
    with torch.no_grad():
        want = model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def asked(position_ids):
        raise AssertionError("the position ids were looked at")

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", asked)
    with torch.no_grad():
        got = ReferenceTrunk(model)(ids)
    assert torch.equal(got, want)
