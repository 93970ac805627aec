"""Parts of the head alone: which rows are chosen, whose columns are where, how parts merge.

Exact: orders, columns, sizes. Rounds: values are float32 against float64 NumPy (1e-5).
"""

import head_oracle as oracle
import numpy as np
import pytest
import torch
from cases import DIRECTIONS

from safereg_kernels import linear_ce_kl, masked_kl
from safereg_kernels.block import DIVERGENCE, ENTROPY, LABEL_ELSEWHERE, LABEL_INVALID, REF_B, Block
from safereg_kernels.budget import ChunkSizes, chunk_sizes
from safereg_kernels.path import path_for
from safereg_kernels.selection import select_rows
from safereg_kernels.shard import VocabShard, local_columns, local_labels
from safereg_kernels.spec import LossSpec

ROWS, COLUMNS = 5, 1400
TEMPERATURE = 0.7


def test_columns_and_labels_of_a_shard() -> None:
    """Ranks with 4, 0 and 6 columns of a vocabulary of 8 tokens and 2 columns of padding."""
    labels = torch.tensor([0, 3, 4, 7, 8, 9, -1])
    expected = {  # (start, columns): (tokens, labels)
        (0, 4): (4, [0, 3, LABEL_ELSEWHERE, LABEL_ELSEWHERE]),
        (4, 0): (0, [LABEL_ELSEWHERE] * 4),
        (4, 6): (4, [LABEL_ELSEWHERE, LABEL_ELSEWHERE, 0, 3]),
    }
    for (start, columns), (tokens, local) in expected.items():
        shard = VocabShard(group_name="", start=start)
        assert local_columns(columns, 8, shard) == tokens
        found = local_labels(labels, columns, 8, shard)
        assert found.tolist() == [*local, LABEL_INVALID, LABEL_INVALID, LABEL_INVALID]
    whole = local_labels(labels, 10, 8, None)
    assert whole.tolist() == [0, 3, 4, 7, LABEL_INVALID, LABEL_INVALID, LABEL_INVALID]
    assert local_columns(10, 8, None) == 8


def test_selected_rows_carry_their_own_weights() -> None:
    """All rows have a cross-entropy and every other one a divergence: no row takes another's."""
    generator = torch.Generator().manual_seed(3)
    hidden, reference = torch.randn(2, 6, 4, generator=generator)
    head = torch.randn(9, 4, generator=generator)
    labels = torch.arange(6)
    ce_weights = torch.arange(1.0, 7.0)
    kl_weights = torch.tensor([0.0, 2.0, 0.0, 3.0, 0.0, 4.0])
    selection = select_rows(ce_weights, kl_weights, None, torch.device("cpu"))
    assert selection.order.tolist() == [1, 3, 5, 0, 2, 4]
    assert selection.ce_weights.tolist() == [2, 4, 6, 1, 3, 5]
    assert selection.kl_weights.tolist() == [2, 3, 4, 0, 0, 0]
    assert not selection.is_in_order
    assert select_rows(ce_weights, kl_weights * 0, None, torch.device("cpu")).is_in_order

    _, ce, divergence = linear_ce_kl(
        *(hidden, head, labels),
        ce_weights=ce_weights,
        kl_weights=kl_weights,
        reference_hidden=reference,
        reference_head=head,
    )[:3]
    x, y = (hidden @ head.T).double().numpy(), (reference @ head.T).double().numpy()
    np.testing.assert_allclose(ce.numpy(), oracle.cross_entropy(x, labels.numpy()), rtol=1e-5)
    expected = np.where(kl_weights != 0, oracle.divergence(x, y, "forward"), 0.0)
    np.testing.assert_allclose(divergence.numpy(), expected, rtol=1e-5)


@DIRECTIONS
def test_parts_merge_to_whole_rows(direction: str, path: str) -> None:
    """Three parts of unlike size and mass have the divergence and entropy of the whole rows."""
    if direction == "jsd":
        pytest.skip("its share of a part is known only after the merge")
    generator = torch.Generator().manual_seed(4)
    x, y = 2 * torch.randn(2, ROWS, COLUMNS, generator=generator)
    x[:, 1300:] += 3.0  # most of the mass is in a small part
    spec = LossSpec(direction=direction, temperature=TEMPERATURE, has_entropy=True)
    functions = path_for(x.device)
    parts = []
    for begin, end in ((0, 700), (700, 1300), (1300, COLUMNS)):
        block = Block(
            policy=x[:, begin:end].contiguous(),
            reference=y[:, begin:end].contiguous(),
            labels=torch.full((ROWS,), LABEL_ELSEWHERE),
            ce_weights=torch.ones(ROWS),
            kl_weights=torch.ones(ROWS),
            num_columns=end - begin,
        )
        parts.append(functions.row_statistics(block, spec))
    merged = functions.merge_statistics(torch.stack(parts, 1), spec)
    divergence = merged[:, DIVERGENCE] / (merged[:, REF_B] if direction == "l2" else 1)
    a, b = x.double().numpy(), y.double().numpy()
    expected = oracle.divergence(a, b, direction, TEMPERATURE)
    np.testing.assert_allclose(divergence.numpy(), expected, rtol=1e-5)
    log_p = oracle.log_softmax(a)
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    np.testing.assert_allclose(merged[:, ENTROPY].numpy(), entropy, rtol=1e-5)


@DIRECTIONS
def test_few_long_rows_are_split(direction: str, path: str) -> None:
    """On the Triton path two programs share a row of three blocks; nothing of it is lost."""
    generator = torch.Generator().manual_seed(6)
    x, y = 2 * torch.randn(2, ROWS, 700, generator=generator)
    x.requires_grad_()
    weights = torch.arange(1.0, ROWS + 1)
    loss, divergence = masked_kl(x, y, weights, direction=direction, temperature=TEMPERATURE)
    loss.backward()
    a, b = x.detach().double().numpy(), y.double().numpy()
    expected = oracle.divergence(a, b, direction, TEMPERATURE)
    np.testing.assert_allclose(divergence.numpy(), expected, rtol=1e-5)
    grad = oracle.divergence_grad(a, b, direction, TEMPERATURE) * weights.numpy()[:, None]
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), grad, rtol=4e-5, atol=1e-6)


def test_chunks_are_no_larger_than_asked_for() -> None:
    sizes = {"logits_bytes": 4096, "grad_bytes": 4096, "head_bytes": 1 << 30}
    assert chunk_sizes(100, chunk_tokens=7, is_collected=False, **sizes) == ChunkSizes(7, 7)
    assert chunk_sizes(9000, chunk_tokens=5000, is_collected=True, **sizes) == (1024, 5000)
    assert chunk_sizes(3, chunk_tokens=7, is_collected=True, **sizes) == ChunkSizes(3, 3)
    small = {**sizes, "head_bytes": 512 * 4096}  # 256 rows of logits and of gradient
    assert chunk_sizes(9000, chunk_tokens=None, is_collected=False, **small).logits_rows <= 256


def few_rows() -> dict[str, torch.Tensor]:
    """Five rows of a frozen head; the last one has a divergence and no cross-entropy."""
    generator = torch.Generator().manual_seed(9)
    hidden, reference = torch.randn(2, ROWS, 4, generator=generator)
    return {
        "policy_hidden": hidden,
        "policy_head": torch.randn(9, 4, generator=generator),
        "labels": torch.arange(ROWS),
        "ce_weights": torch.tensor([1.0, 0.0, 2.0, 3.0, 0.0]),
        "kl_weights": torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0]),
        "reference_hidden": reference,
        "reference_head": torch.randn(9, 4, generator=generator),
    }


def test_a_reported_row_of_nan_leaves_no_gradient(path: str) -> None:
    """Its cross-entropy is only looked at: 0 * nan must not reach the trunk."""
    inputs = few_rows()
    inputs["policy_hidden"][1] = torch.nan
    hidden = inputs["policy_hidden"].requires_grad_()
    report = torch.tensor([False, True, False, False, False])
    loss, ce = linear_ce_kl(**inputs, ce_report=report)[:2]
    loss.backward()
    assert ce[1].isnan()
    assert hidden.grad is not None
    assert (hidden.grad[1] == 0).all()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[[0, 2, 3, 4]] != 0).all()


def test_a_row_that_one_model_has_no_token_for_is_nan(path: str) -> None:
    x, y = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    x[0], y[1] = -torch.inf, -torch.inf
    for direction in ("forward", "reverse"):
        divergence = masked_kl(x, y, torch.ones(3), direction=direction)[1]
        assert divergence.isnan().tolist() == [True, True, False]


def test_accuracy_is_of_rows_with_a_cross_entropy(path: str) -> None:
    """Where every label is the best token, rows that only have a divergence still yield 0."""
    inputs = few_rows()
    inputs["labels"] = (inputs["policy_hidden"] @ inputs["policy_head"].T).argmax(-1)
    metrics = linear_ce_kl(**inputs, return_accuracy=True)[3]
    assert metrics.accuracy is not None
    assert metrics.accuracy.tolist() == [1, 0, 1, 1, 0]


def test_float16_gradients_of_the_sum_and_of_each_token_are_one(path: str) -> None:
    """Weights of 1/1000 are scaled up on the way, in both operators, and down again."""
    grads = {}
    for reduction in ("sum", "none"):
        inputs = {
            name: tensor.half() if tensor.ndim == 2 else tensor
            for name, tensor in few_rows().items()
        }
        for name in ("ce_weights", "kl_weights"):
            inputs[name] = inputs[name] / 1000
        hidden = inputs["policy_hidden"].requires_grad_()
        given = {"reduction": reduction, "logits_dtype": torch.float16}
        linear_ce_kl(**inputs, **given)[0].sum().backward()
        assert hidden.grad is not None
        grads[reduction] = hidden.grad.float()
    assert (grads["sum"].abs().amax(1) > 1e-5).tolist() == [True, False, True, True, True]
    torch.testing.assert_close(grads["none"], grads["sum"], rtol=2e-3, atol=1e-7)
