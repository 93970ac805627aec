"""What a case of the gate is, and the inputs it is run on."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from device_truth import Formula
from torch import Tensor

from safereg_kernels import TopK

SPREAD = 2.0
"""Standard deviation of the logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A call, and the shape it is made at."""

    name: str
    rows: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    formula: Formula = field(default_factory=Formula)
    apart: float | None = None
    """Standard deviation of policy - reference; None = two unrelated models."""
    row_stride: int | None = None
    """In elements; None = the columns. Only the pages of the rows themselves are touched."""
    offset: int = 0
    """Elements before the first row."""
    on_side_stream: bool = False
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Columns that are tokens."""
        return self.formula.vocab_size or self.vocab

    @property
    def peak(self) -> float:
        """Logit with 62 % of the mass at T or at 1, where that is less, the others of SPREAD."""
        return min(
            temperature * (math.log(self.tokens) + 0.5) + SPREAD**2 / (2 * temperature)
            for temperature in (1.0, self.formula.temperature)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsCase(Case):
    """`masked_kl`."""

    rows_checked: int | None = None
    """This many in the beginning, the middle and the end; None = all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCase(Case):
    """`linear_ce_kl`."""

    hidden: int = 128
    is_head_trained: bool = True
    has_bias: bool = False
    weights_on_host: bool = False
    logits_dtype: torch.dtype = torch.float32
    is_difference: bool = False
    topk: int | None = None
    reduction: str = "sum"
    chunk_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCase(Case):
    """The functions of a path on columns split by hand, as tensor-parallel ranks hold them."""

    parts: tuple[float, ...] = (0.37, 0.62, 0.01)
    """Shares of the columns; (1.0,) = whole rows."""
    in_place: bool = False
    """The gradient overwrites the policy's logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What every case needs of its rows."""

    labels: Tensor
    """[rows] int64; -100 in rows without CE."""
    ce_weights: Tensor
    kl_weights: Tensor
    peaks: Tensor
    """[rows, 2] the token that has most of the policy's mass, and of the reference's."""
    kind: Tensor
    """[rows] row number modulo 4."""


def row_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Weights, labels and peaks: half of the labels are the policy's peak, some lie at an edge."""
    device, rows = generator.device, case.rows
    tokens = case.tokens
    kind = torch.arange(rows, device=device) % 4
    weights = torch.rand(2, rows, device=device, generator=generator) + 0.5
    peaks = torch.randint(0, tokens, (rows, 2), device=device, generator=generator)
    if case.apart is not None:
        peaks[:, 0] = peaks[:, 1]
    labels = torch.randint(0, tokens, (rows,), device=device, generator=generator)
    is_sure = torch.arange(rows, device=device) // 4 % 2 == 0
    labels = torch.where(is_sure, peaks[:, 0], labels)
    labels[0:2], labels[4:6] = 0, tokens - 1
    return Inputs(
        labels=torch.where(kind <= 1, labels, -100),
        ce_weights=torch.where(kind <= 1, weights[0], 0.0),
        kl_weights=torch.where(kind % 2 == 0, weights[1], 0.0),
        peaks=peaks,
        kind=kind,
    )


def logits_pair(case: Case, inputs: Inputs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Policy's and reference's logits, of deviation SPREAD, with one peak."""
    stride = case.row_stride or case.vocab
    pair = []
    for model in range(2):
        shape, strides = (case.rows, case.vocab), (stride, 1)
        if model == 0 or stride < 2 * case.vocab:
            size = case.offset + case.rows * stride
            storage = torch.empty(size, dtype=case.dtype, device=generator.device)
            logits = storage.as_strided(shape, strides, case.offset)
        else:  # rows so far apart that those of the reference lie between those of the policy
            logits = storage.as_strided(shape, strides, case.offset + case.vocab + 1)
        if case.apart is not None and model == 0:
            logits.normal_(std=case.apart, generator=generator)
        else:
            logits.normal_(std=SPREAD, generator=generator)
            logits.scatter_(1, inputs.peaks[:, model, None], case.peak)
        pair.append(logits)
    policy, reference = pair
    if case.apart is not None:
        policy += reference
    policy[:, case.tokens :] = 60.0  # would have all the mass
    reference[:, case.tokens :] = torch.nan
    policy[inputs.kind == 3] = 0.0 if isinstance(case, ShardCase) else torch.nan
    reference[inputs.kl_weights == 0] = torch.nan
    return policy, reference


def linear_tensors(case: LinearCase, inputs: Inputs, generator: torch.Generator) -> dict[str, Any]:
    """Hidden states whose products with the head have deviation SPREAD, with one peak."""
    size, device = (case.vocab, case.hidden), generator.device

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, device=device).normal_(std=std, generator=generator)

    def coarse(tensor: Tensor) -> Tensor:
        """Sixteenths: sums and differences of a few such are exact in bfloat16."""
        return (tensor * 16).round().clamp(-64, 64) / 16

    heads = [normal(*size, std=SPREAD / case.hidden**0.5).to(case.dtype) for _ in range(2)]
    if case.is_difference:
        heads[1] = heads[0]
    hidden = []
    for model in range(2):
        at_peak = heads[model][inputs.peaks[:, model]].float()
        strength = case.peak / at_peak.square().sum(-1, keepdim=True).clamp_min(1.0)
        hidden.append(normal(case.rows, case.hidden) + at_peak * strength)
    if case.is_difference:
        apart = normal(case.rows, case.hidden, std=case.apart or 0.3)
        hidden = [coarse(hidden[1]) + coarse(apart), coarse(hidden[1])]
    hidden = [states.to(case.dtype) for states in hidden]
    hidden[0][inputs.kind == 3] = torch.nan
    hidden[1][inputs.kl_weights == 0] = torch.nan
    tensors: dict[str, Any] = {
        "policy_hidden": hidden[0].requires_grad_(),
        "policy_head": heads[0].requires_grad_(case.is_head_trained),
    }
    if case.has_bias:
        tensors["policy_bias"] = (
            normal(case.vocab).to(case.dtype).requires_grad_(case.is_head_trained)
        )
    if case.topk is not None:
        ids = torch.rand(case.rows, 8 * case.topk, device=device, generator=generator).topk(
            case.topk, dim=-1
        )
        spread = case.tokens // (8 * case.topk)
        logits = normal(case.rows, case.topk, std=SPREAD)
        tensors["reference_topk"] = TopK(ids=ids.indices * spread, logits=logits)
    else:
        tensors |= {"reference_hidden": hidden[1], "reference_head": heads[1]}
    return tensors


def of_rows(inputs: Inputs, at: Tensor) -> Inputs:
    """The same of some rows."""
    return Inputs(**{name: getattr(inputs, name)[at] for name in Inputs.__slots__})


def vars_of(formula: Formula, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The formula as keyword arguments."""
    return {name: getattr(formula, name) for name in Formula.__slots__ if name not in without}


def producing(case: Case, device: torch.device) -> AbstractContextManager:
    """The current stream, or one of its own that is busy at first: early readers read rubbish."""
    if not case.on_side_stream or device.type != "cuda":
        return nullcontext()
    return _SideStream(device)


class _SideStream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._inside = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        self._inside.__enter__()
        torch.cuda._sleep(100_000_000)  # 50 ms

    def __exit__(self, *error: Any) -> None:
        self._stream.synchronize()
        self._inside.__exit__(*error)
