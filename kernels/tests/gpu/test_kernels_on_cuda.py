"""The Triton kernels on a real GPU against the float64 oracle (skipped without one).

May round: float32 as on the CPU; a product of bfloat16 operands keeps a float32 result, so only the
gradient's own rounding to bfloat16 shows (2^-8 of the element), twice that after a matrix product.
"""

import head_oracle as oracle
import numpy as np
import pytest
import torch

from safereg_kernels import linear_ce_kl, masked_kl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
TOKENS, HIDDEN = 37, 96


def truth(tensor):
    return tensor.detach().double().cpu().numpy()


def assert_close(got, want, relative):
    scale = np.abs(want).max(initial=0.0)
    np.testing.assert_allclose(truth(got), want, rtol=relative, atol=relative * 0.1 * scale + 1e-9)


@pytest.mark.parametrize("vocab", [509, 32003])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 4e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("direction", oracle.DIRECTIONS)
def test_masked_kl(direction, dtype, relative, vocab):
    generator = torch.Generator().manual_seed(vocab)
    x, y = (torch.randn(2, TOKENS, vocab, generator=generator) * 3).to(DEVICE, dtype)
    weights = (torch.rand(TOKENS, generator=generator) - 0.3).clamp_min(0).to(DEVICE)
    x[weights == 0] = torch.nan
    x.requires_grad_()
    loss, div = masked_kl(x, y, weights, direction=direction)
    (loss * 3).backward()
    w, kept = truth(weights), truth(weights) != 0
    a, b = truth(x)[kept], truth(y)[kept]
    assert_close(div[kept], oracle.divergence(a, b, direction), 1e-4)
    grad = oracle.divergence_grad(a, b, direction) * 3 * w[kept, None]
    assert_close(x.grad[kept], grad, relative)
    assert (x.grad[~torch.from_numpy(kept)] == 0).all()


@pytest.mark.parametrize("chunk_tokens", [None, 16])
@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-3), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("direction", oracle.DIRECTIONS)
def test_linear_ce_kl(direction, dtype, relative, is_trained, chunk_tokens):
    generator = torch.Generator().manual_seed(1)
    vocab = 5003
    hidden, reference = torch.randn(2, TOKENS, HIDDEN, generator=generator).to(DEVICE, dtype)
    heads = (torch.randn(2, vocab, HIDDEN, generator=generator) * 0.3).to(DEVICE, dtype)
    head, reference_head = heads[0].clone().requires_grad_(is_trained), heads[1]
    weights = (torch.rand(2, TOKENS, generator=generator) - 0.3).clamp_min(0)  # on the host
    labels = torch.randint(0, vocab, (TOKENS,), generator=generator).to(DEVICE)
    hidden.requires_grad_()
    loss, ce, div = linear_ce_kl(
        hidden,
        head,
        labels,
        ce_weights=weights[0],
        kl_weights=weights[1],
        reference_hidden=reference,
        reference_head=reference_head,
        direction=direction,
        chunk_tokens=chunk_tokens,
    )
    (loss * 3).backward()
    want = oracle.linear_ce_kl(
        truth(hidden),
        truth(head),
        labels.cpu().numpy(),
        ce_weights=truth(weights[0]),
        kl_weights=truth(weights[1]),
        reference_hidden=truth(reference),
        reference_head=truth(reference_head),
        direction=direction,
    )
    assert_close(ce, want.ce, 1e-3)
    assert_close(div, want.divergence, 1e-3)
    assert_close(hidden.grad, want.grad_hidden * 3, relative)
    if is_trained:
        assert_close(head.grad, want.grad_head * 3, relative)
    else:
        assert head.grad is None
