"""`linear_cross_entropy` against torch's `cross_entropy`, `LinearCEKL` against `linear_ce_kl`.

The first may round to float32 (the judge is float64); the second is exact: it is the same call.
"""

import copy
import pickle

import pytest
import torch

from safereg_kernels import LinearCEKL, ShapeError, TokenMetrics, linear_ce_kl, linear_cross_entropy

H, V = 17, 53


def tensors(*shape: int) -> tuple[torch.Tensor, ...]:
    """(hidden, head, bias, labels); every third label does not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, H, generator=generator).requires_grad_()
    head = torch.randn(V, H, generator=generator).requires_grad_()
    bias = torch.randn(V, generator=generator).requires_grad_()
    labels = torch.randint(V, shape, generator=generator)
    labels.view(-1)[::3] = -100
    return hidden, head, bias, labels


def truth(hidden, head, bias, labels, *, softcap, logit_scale, z_loss, reduction):
    """Loss and gradients of (hidden, head, bias) in float64, from full logits."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, head, bias)]
    logits = logit_scale * (leaves[0] @ leaves[1].T + leaves[2])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    each = ce + z_loss * torch.where(labels != -100, logits.logsumexp(-1) ** 2, 0.0)
    loss = {"sum": each.sum(), "mean": each.sum() / (labels != -100).sum(), "none": each}[reduction]
    return loss, torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": None, "logit_scale": 1.0, "z_loss": 0.0},
        {"softcap": 2.0, "logit_scale": 0.25, "z_loss": 0.1},
    ],
    ids=["plain", "transformed"],
)
def test_cross_entropy(options, reduction):
    hidden, head, bias, labels = tensors(11)
    loss = linear_cross_entropy(hidden, head, labels, bias=bias, reduction=reduction, **options)
    expected, grads = truth(hidden, head, bias, labels, reduction=reduction, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(loss.sum(), (hidden, head, bias))
    for our, grad in zip(ours, grads, strict=True):
        torch.testing.assert_close(our.double(), grad, rtol=1e-4, atol=1e-5)


def test_shift_moves_the_labels_by_one():
    hidden, head, _, labels = tensors(2, 6)
    loss = linear_cross_entropy(hidden, head, labels, shift=True)
    aligned = linear_cross_entropy(hidden[:, :-1], head, labels[:, 1:].contiguous())
    torch.testing.assert_close(loss, aligned)
    metrics = linear_cross_entropy(hidden, head, labels, shift=True, return_lse=True)
    assert isinstance(metrics[1], TokenMetrics)
    assert metrics[1].lse.shape == labels.shape
    assert metrics[1].accuracy is None
    assert torch.equal(metrics[0], loss)


def test_no_label_that_counts_gives_zero():
    hidden, head, _, labels = tensors(5)
    loss = linear_cross_entropy(hidden, head, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_module_is_the_function():
    hidden, head, bias, labels = tensors(2, 6)
    _, reference_head, reference_bias, _ = tensors(2, 6)
    given = {
        "kl_weights": torch.rand(2, 6, generator=torch.Generator().manual_seed(1)),
        "reference_hidden": hidden.detach().flip(0),
        "reference_head": reference_head.detach() * 0.9,
        "policy_bias": bias,
        "reference_bias": reference_bias.detach(),
    }
    options = {
        "direction": "jsd",
        "beta": 0.3,
        "temperature": 2.0,
        "z_loss": 0.01,
        "policy_softcap": 4.0,
        "reference_logit_scale": 0.5,
        "shift": True,
        "reduction": "mean",
        "return_lse": True,
    }
    module = LinearCEKL(**options)
    assert not list(module.parameters())
    expected = linear_ce_kl(hidden, head, labels, **given, **options)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        results = each(hidden, head, labels, **given)
        assert len(results) == 4
        assert all(map(torch.equal, results[:3], expected[:3]))
        assert torch.equal(results[3].lse, expected[3].lse)


def test_module_shows_what_is_not_the_default():
    assert repr(LinearCEKL()) == "LinearCEKL()"
    module = LinearCEKL(direction="reverse", shift=True, logits_dtype=torch.bfloat16)
    shown = "LinearCEKL(direction='reverse', logits_dtype=torch.bfloat16, shift=True)"
    assert repr(module) == shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "sideways"}, "direction must be one of"),
        ({"direction": "jsd", "beta": 1.0}, r"beta must lie in \(0, 1\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"z_loss": -1.0}, "z_loss must be finite and >= 0"),
        ({"reference_softcap": -1.0}, "reference_softcap must be positive"),
        ({"policy_logit_scale": 0.0}, "policy_logit_scale must be positive"),
        ({"chunk_tokens": 0}, "chunk_tokens must be positive"),
        ({"head_bytes": 0}, "head_bytes must be positive"),
        ({"reduction": "median"}, "reduction must be"),
        ({"logits_dtype": torch.int64}, "logits_dtype must be"),
    ],
)
def test_module_refuses_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        LinearCEKL(**options)


def test_module_refuses_an_empty_vocabulary():
    with pytest.raises(ShapeError, match="vocab_size 0"):
        LinearCEKL(vocab_size=0)
