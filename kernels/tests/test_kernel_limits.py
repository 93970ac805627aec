"""What public kernels got wrong, one test per class of bug, on both paths of `safereg_kernels`.

Claimed: padding of the vocabulary, soft caps, odd strides, offsets beyond 2^31, suppressed tokens,
low precision and any upstream scalar do no harm; bad input is refused before anything runs; and the
path that is asked for is the one that runs. Exact: zeros, refusals, launches. May round: float32
arithmetic as in test_kernels.py; a bfloat16 result is held to twice the error of an honest eager
bfloat16 computation (the interpreter truncates where a GPU rounds: one unit in the last place).
"""

from typing import Any

import head_oracle as oracle
import numpy as np
import pytest
import torch
from cases import (
    DIRECTIONS,
    GRADIENT,
    TOKENS,
    VOCAB,
    as_truth,
    assert_close,
    assert_head_matches,
    grad_of,
    head_inputs,
    head_truth,
    kl_truth,
    logits_pair,
)

from safereg_kernels import (
    ShapeError,
    budget,
    linear_ce_kl,
    masked_kl,
    triton_kernels,
)

pytestmark = pytest.mark.usefixtures("path")


# ---- the path that runs ------------------------------------------------------------------------


def test_the_path_asked_for_is_the_one_that_runs(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    for name in ("statistics_kernel", "merge_kernel", "gradient_kernel"):
        kernel = getattr(triton_kernels, name)

        class Counted:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                launched.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(triton_kernels, name, Counted(name, kernel))
    x, y, weights = logits_pair(tokens=37)
    masked_kl(x, y, weights)[0].backward()
    linear_ce_kl(**head_inputs(tokens=37), chunk_tokens=20)[0].backward()
    chunk = ["statistics_kernel", "gradient_kernel"]
    assert launched == ([] if path == "eager" else chunk * 3)
    masked_kl(x[:4], y[:4], weights[:4])  # few rows: their columns are spread over programs
    assert launched[6:] == ([] if path == "eager" else ["statistics_kernel", "merge_kernel"])


def test_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, weights = logits_pair()
    monkeypatch.setenv("SAFEREG_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        masked_kl(x, y, weights)


# ---- vocabularies, strides, offsets ------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 256, 257, 500, VOCAB])
@DIRECTIONS
def test_padding_of_the_vocabulary_takes_no_part(direction: str, vocab_size: int) -> None:
    x, y, weights = logits_pair()
    with torch.no_grad():
        x[:, vocab_size:] = 50.0  # would take all the probability
        y[:, vocab_size + 1 :] = torch.nan
    loss, div = masked_kl(x, y, weights, direction=direction, vocab_size=vocab_size)
    loss.backward()
    want, want_div, want_grad = kl_truth(x[:, :vocab_size], y[:, :vocab_size], weights, direction)
    assert_close(loss, want)
    assert_close(div, want_div)
    assert_close(grad_of(x)[:, :vocab_size], want_grad, relative=GRADIENT)
    assert (grad_of(x)[:, vocab_size:] == 0).all()


@DIRECTIONS
def test_padding_of_the_head(direction: str) -> None:
    inputs = head_inputs()
    inputs["labels"] %= 500
    assert_head_matches({**inputs, "direction": direction, "vocab_size": 500, "chunk_tokens": 9})
    assert (grad_of(inputs["policy_head"])[500:] == 0).all()


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000])
@DIRECTIONS
def test_any_vocabulary(direction: str, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    x, y = torch.randn(2, 3, vocab, generator=generator) * 3
    weights = torch.tensor([0.5, 0.0, 2.0])
    x.requires_grad_()
    loss, _ = masked_kl(x, y, weights, direction=direction)
    loss.backward()
    want, _, want_grad = kl_truth(x, y, weights, direction)
    assert_close(loss, want)
    assert_close(grad_of(x), want_grad, relative=GRADIENT)


def test_rows_may_have_any_stride() -> None:
    x, y, weights = logits_pair()
    base = torch.full((TOKENS, 2 * VOCAB + 3), torch.nan)
    base[:, 1 : VOCAB + 1] = x.detach()
    strided = base[:, 1 : VOCAB + 1].requires_grad_()
    repeated = y[1].expand(TOKENS, VOCAB)  # one row for all: row stride 0
    loss, _ = masked_kl(strided, repeated, weights)
    loss.backward()
    want, _, want_grad = kl_truth(x, repeated, weights, "forward")
    assert_close(loss, want)
    assert_close(grad_of(strided), want_grad, relative=GRADIENT)


def test_columns_must_lie_in_one_piece() -> None:
    x, y, weights = logits_pair()
    with pytest.raises(ShapeError, match=r"policy_logits has strides .*contiguous\(\)"):
        masked_kl(x.detach().T.contiguous().T, y, weights)
    with pytest.raises(ShapeError, match="reference_logits has strides"):
        masked_kl(x, y.T.contiguous().T, weights)


def test_offsets_beyond_two_to_the_31() -> None:
    """The third row starts past element 2^31; only its pages are ever touched."""
    stride = 2**30 + 8
    storage = torch.empty(2 * stride + VOCAB, dtype=torch.bfloat16)
    x = storage.as_strided((3, VOCAB), (stride, 1))
    y = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[2] = y[2] + 1 * (torch.arange(VOCAB) % 2)
    weights = torch.tensor([0.0, 0.0, 1.0])
    x.requires_grad_()
    loss, _ = masked_kl(x, y, weights)
    want = oracle.divergence(as_truth(x[2:]), as_truth(y[2:]), "forward")
    assert_close(loss, want[0])


# ---- formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("caps", [(5.0, 5.0), (2.0, None), (None, 3.0)])
@DIRECTIONS
def test_soft_capped_logits(direction: str, caps: tuple[float | None, float | None]) -> None:
    options = {"policy_softcap": caps[0], "reference_softcap": caps[1], "direction": direction}
    assert_head_matches({**head_inputs(), **options})


def shared_head(apart: float, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two models `apart` in their hidden states, with one frozen head."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, 24, generator=generator)
    change = torch.randn(TOKENS, 24, generator=generator) * apart
    inputs = head_inputs()
    head = inputs["policy_head"].detach().to(dtype)
    return {
        **inputs,
        "policy_hidden": (hidden + change).to(dtype).requires_grad_(),
        "policy_head": head,
        "reference_hidden": hidden.to(dtype),
        "reference_head": head,
    }


@pytest.mark.parametrize("softcap", [None, 5.0])
@DIRECTIONS
def test_difference_form(direction: str, softcap: float | None) -> None:
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    options = {
        "policy_bias": bias,
        "reference_bias": bias,
        "policy_softcap": softcap,
        "reference_softcap": softcap,
        "is_difference": True,
        "chunk_tokens": 11,
    }
    assert_head_matches({**shared_head(0.3), **options, "direction": direction})


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_rounded_logits_drown_a_small_divergence(direction: str) -> None:
    """bfloat16 logits: the gradient is mostly noise; their difference keeps it; float32 has it."""
    errors = {}
    for name, options in {
        "float32": {},
        "rounded": {"logits_dtype": torch.bfloat16},
        "difference": {"logits_dtype": torch.bfloat16, "is_difference": True},
    }.items():
        inputs = shared_head(0.02, torch.bfloat16)
        inputs["ce_weights"] = torch.zeros(TOKENS)
        want = head_truth({**inputs, "direction": direction}).grad_hidden
        loss, _, _ = linear_ce_kl(**inputs, direction=direction, **options)
        loss.backward()
        got = as_truth(grad_of(inputs["policy_hidden"]))
        active = np.linalg.norm(want, axis=1) > 0
        error = np.linalg.norm(got - want, axis=1)[active] / np.linalg.norm(want, axis=1)[active]
        errors[name] = float(np.median(error))
    assert errors["float32"] < 0.01
    assert errors["difference"] < 0.1
    assert errors["rounded"] > 4 * errors["difference"]


@DIRECTIONS
def test_bfloat16_gradient_is_as_good_as_honest_rounding(direction: str, path: str) -> None:
    """|ours - truth| <= 2 |bfloat16 eager - truth| + 1e-6, elementwise."""
    x, y, weights = logits_pair(torch.bfloat16)
    loss, _ = masked_kl(x, y, weights, direction=direction)
    loss.backward()
    _, _, want = kl_truth(x, y, weights, direction)
    got = as_truth(grad_of(x))
    honest = as_truth(torch.from_numpy(want).bfloat16())
    allowed = 2 * np.abs(honest - want) + 1e-6
    if path == "triton":
        allowed += 2**-7 * np.abs(want)  # the interpreter truncates
    allowed += GRADIENT * np.abs(want)
    worst = np.unravel_index(np.argmax(np.abs(got - want) - allowed), want.shape)
    assert np.abs(got - want)[worst] <= allowed[worst], (worst, got[worst], want[worst])


def test_float16_weights_of_one_token_in_a_million() -> None:
    """In float16 a probability times 1e-6 is 0: gradients are formed at a scale that survives."""
    inputs = head_inputs(torch.float16)
    inputs["ce_weights"] *= 1e-6
    inputs["kl_weights"] *= 1e-6
    loss, _, _ = linear_ce_kl(**inputs, logits_dtype=torch.float16)
    (loss * 2.0**16).backward()
    want = head_truth(inputs)
    for name, truth in (("policy_hidden", want.grad_hidden), ("policy_head", want.grad_head)):
        got, truth = as_truth(grad_of(inputs[name])), truth * 2.0**16
        assert np.linalg.norm(got - truth) < 0.01 * np.linalg.norm(truth)


@DIRECTIONS
def test_suppressed_tokens_in_both_models(direction: str) -> None:
    """0 * nan: a token that both models exclude is absent, also where a whole block is excluded."""
    x, y, weights = logits_pair()
    with torch.no_grad():
        x[:, 200:300] = -torch.inf
        x[:, 3] = torch.finfo(torch.float32).min
        y[:, 200:300] = -torch.inf
        y[:, 3] = torch.finfo(torch.float32).min
    if direction == "l2":  # finfo.min is a finite logit there
        x.data[:, 3], y[:, 3] = 0.0, 0.0
    loss, div = masked_kl(x, y, weights, direction=direction)
    loss.backward()
    want, want_div, want_grad = kl_truth(x, y, weights, direction)
    assert_close(loss, want)
    assert_close(div, want_div)
    assert_close(grad_of(x), want_grad, relative=GRADIENT)


def test_a_row_without_any_token_is_nan_not_zero() -> None:
    x = torch.full((2, VOCAB), -torch.inf)
    _, div = masked_kl(x, x, torch.tensor([1.0, 0.0]))
    assert torch.isnan(div[0])
    assert div[1] == 0


def test_infinite_reverse_divergence_is_reported() -> None:
    x, y, weights = logits_pair()
    y[1, :300] = -torch.inf  # a whole block the policy believes in
    y[2, 7] = -torch.inf
    with torch.no_grad():
        loss, div = masked_kl(x, y, weights, direction="reverse")
    assert torch.isinf(div[[1, 2]]).all()
    assert torch.isinf(loss)
    assert torch.isfinite(div[4:]).all()


def test_many_upstream_scalars() -> None:
    """Loss coefficient, AMP scale, accumulation; and an upstream gradient that is broadcast."""
    x, y, weights = logits_pair()
    loss, _ = masked_kl(x, y, weights)
    (loss.expand(3) * torch.tensor([1.0, 2.0**16, -0.25])).sum().backward()
    _, _, want = kl_truth(x, y, weights, "forward")
    assert_close(grad_of(x), want * (1 + 2.0**16 - 0.25), relative=GRADIENT)


@pytest.mark.parametrize("upstream", [0.0, float("nan")])
def test_degenerate_upstream_scalars(upstream: float) -> None:
    x, y, weights = logits_pair()
    masked_kl(x, y, weights)[0].backward(torch.tensor(upstream))
    grad = grad_of(x)
    assert (grad[weights == 0] == 0).all()
    assert (torch.isnan(grad) if upstream else grad == 0)[weights != 0].all()


# ---- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.full((TOKENS,), VOCAB)}, ValueError, r"labels must lie in \[0, 509\)"),
        ({"labels": torch.zeros(TOKENS)}, ValueError, "int64"),
        ({"ce_weights": torch.full((TOKENS,), -1.0)}, ValueError, "ce_weights must be finite"),
        ({"kl_weights": torch.full((TOKENS,), torch.nan)}, ValueError, "kl_weights must be finite"),
        ({"kl_weights": torch.ones(TOKENS, dtype=torch.int64)}, ValueError, "floating point"),
        ({"policy_hidden": torch.zeros(TOKENS, 24).bfloat16()}, ValueError, "one dtype"),
        ({"reference_head": torch.zeros(VOCAB, 17).half()}, ValueError, "one dtype"),
        ({"policy_head": torch.zeros(VOCAB, 24, device="meta")}, ValueError, "one device"),
        ({"vocab_size": VOCAB + 1}, ShapeError, "vocab_size 510"),
        ({"vocab_size": 0}, ShapeError, "vocab_size 0"),
        ({"policy_softcap": 0.0}, ValueError, "policy_softcap must be positive"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be positive"),
        ({"logits_dtype": torch.float16}, ValueError, "logits_dtype must be"),
        ({"is_difference": True}, ValueError, "one head"),
        ({"direction": "sideways"}, ValueError, "direction must be one of"),
    ],
)
def test_bad_input_to_the_head(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        linear_ce_kl(**{**head_inputs(), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.full((TOKENS,), -1.0)}, ValueError, "weights must be finite and >= 0"),
        ({"weights": torch.full((TOKENS,), torch.inf)}, ValueError, "weights must be finite"),
        ({"reference_logits": torch.zeros(TOKENS, VOCAB).bfloat16()}, ValueError, "one dtype"),
        ({"reference_logits": torch.zeros(TOKENS, VOCAB, device="meta")}, ValueError, "one device"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"vocab_size": VOCAB + 1}, ShapeError, "vocab_size 510"),
    ],
)
def test_bad_input_to_masked_kl(change: dict[str, Any], error: type, message: str) -> None:
    x, y, weights = logits_pair()
    with pytest.raises(error, match=message):
        masked_kl(**{"policy_logits": x, "reference_logits": y, "weights": weights, **change})


# ---- memory and compilation --------------------------------------------------------------------


def peak_extra_bytes(tokens: int) -> int:
    """Largest sum of live tensor bytes during forward and backward, beyond inputs and results."""
    hidden = torch.randn(tokens, 16, requires_grad=True)
    head = torch.randn(1031, 16)
    inputs = {
        "labels": torch.zeros(tokens, dtype=torch.int64),
        "ce_weights": torch.ones(tokens),
        "kl_weights": torch.ones(tokens),
        "reference_hidden": torch.randn(tokens, 16),
        "reference_head": head,
    }
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        linear_ce_kl(hidden, head, **inputs, chunk_tokens=8)[0].backward()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_memory_does_not_grow_with_the_tokens() -> None:
    chunk = 8 * 1031 * 4
    small, large = peak_extra_bytes(32), peak_extra_bytes(64)
    assert small > 2 * chunk  # the measurement sees the chunks' logits
    assert large - small < 32 * 16 * 4 * 8  # a few vectors and gradients of the hidden states
    assert small < 16 * chunk


@pytest.mark.parametrize("is_collected", [False, True])
@pytest.mark.parametrize("num_rows", [1, 100, 1023, 8192, 50000])
def test_default_chunks_fit_their_budget(num_rows: int, is_collected: bool) -> None:
    logits_bytes, grad_bytes, limit = 128256 * 8, 128256 * 2, 3 << 30
    sizes = budget.chunk_sizes(
        num_rows,
        logits_bytes=logits_bytes,
        grad_bytes=grad_bytes,
        is_collected=is_collected,
        head_bytes=limit,
        chunk_tokens=None,
    )
    assert 1 <= sizes.logits_rows <= sizes.grad_rows <= num_rows
    used = sizes.logits_rows * logits_bytes + sizes.grad_rows * grad_bytes
    assert used <= limit
    if num_rows > 10000:  # as many rows as there is memory for, or as a product has use for
        assert used > 0.8 * limit or sizes.logits_rows >= 960
