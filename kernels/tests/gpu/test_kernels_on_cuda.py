"""The Triton kernels on a real GPU against the NumPy oracle (skipped without one).

Small shapes, few rows: what the gate, at production shapes, does not run. Errors are norms: of each
row of logits or hidden states, and of the head's rows of labels and of the others apart. May round:
float32 as on the CPU; a product of bfloat16 operands keeps a float32 result, so only the gradient's
own rounding to bfloat16 shows (2^-8), once more after a matrix product.
"""

import head_oracle as oracle
import numpy as np
import pytest
import torch
from torch import Tensor

from safereg_kernels import linear_ce_kl, masked_kl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
TOKENS, HIDDEN = 37, 96


def truth(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def assert_rows_close(got: Tensor, want: np.ndarray, relative: float) -> None:
    """Each row in norm; a row that is smaller than most, to as much of a typical one."""
    error = np.linalg.norm(truth(got) - want, axis=-1)
    norm = np.linalg.norm(want, axis=-1)
    assert (error <= relative * np.maximum(norm, 0.1 * np.median(norm))).all(), (error / norm).max()


def assert_norm_close(got: np.ndarray, want: np.ndarray, relative: float) -> None:
    error = np.linalg.norm(got - want)
    assert error <= relative * np.linalg.norm(want), error / np.linalg.norm(want)


@pytest.mark.parametrize("vocab", [509, 32003])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 5e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("direction", oracle.DIRECTIONS)
def test_masked_kl(direction: str, dtype: torch.dtype, relative: float, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    x, y = (torch.randn(2, TOKENS, vocab, generator=generator) * 3).to(DEVICE, dtype)
    weights = (torch.rand(TOKENS, generator=generator) - 0.3).clamp_min(0).to(DEVICE)
    x[weights == 0] = torch.nan
    x.requires_grad_()
    loss, div = masked_kl(x, y, weights, direction=direction)
    (loss * 3).backward()
    w, kept = truth(weights), truth(weights) != 0
    a, b = truth(x)[kept], truth(y)[kept]
    np.testing.assert_allclose(truth(div)[kept], oracle.divergence(a, b, direction), rtol=2e-5)
    grad = oracle.divergence_grad(a, b, direction) * 3 * w[kept, None]
    assert_rows_close(x.grad[kept], grad, relative + 5e-5)
    assert (x.grad[~torch.from_numpy(kept)] == 0).all()


@pytest.mark.parametrize("chunk_tokens", [None, 16])
@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("direction", oracle.DIRECTIONS)
def test_linear_ce_kl(
    direction: str, dtype: torch.dtype, relative: float, is_trained: bool, chunk_tokens: int | None
) -> None:
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
    np.testing.assert_allclose(truth(ce), want.ce, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(truth(div), want.divergence, rtol=2e-5, atol=1e-6)
    assert_rows_close(hidden.grad, want.grad_hidden * 3, relative)
    if not is_trained:
        assert head.grad is None
        return
    is_label = np.zeros(vocab, dtype=bool)
    is_label[labels.cpu().numpy()[truth(weights[0]) != 0]] = True
    for rows in (is_label, ~is_label):
        assert_norm_close(truth(head.grad)[rows], want.grad_head[rows] * 3, relative)
