"""How far from the truth, and how far is allowed.

Tolerances. Arithmetic in float32 from logits of magnitude 20, each off by 1e-6: 1e-5 of a value,
5e-5 of a gradient. A gradient stored in a dtype of unit roundoff u (bfloat16 2^-8, float16 2^-11)
is off by at most u in every element, so by at most u in norm; random mantissas give 0.43 u. The
gradients in hidden states and head are sums of such elements, rounded again: 0.6 u, held to u.
float16 has a smallest step, 2^-24: half of it per element is granted on top. Logits kept in
bfloat16 are compared with float64 from the same rounded logits, and to 2 u: where a sum lies
between two bfloat16 numbers, float32 and float64 may choose differently. Between models that are
nearly the same, a divergence and its gradient are differences of numbers 1 / apart as large. The
interpreter truncates where a GPU rounds: twice as much on the CPU.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gate_inputs import Case, Inputs
from torch import Tensor

VALUE, GRADIENT = 1e-5, 5e-5
UNIT_ROUNDOFF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LAST_COLUMNS = 1 / 64
"""Share of the columns that is looked at apart: the partial block at the end of a row is one."""
KINDS = {"both": 0, "CE": 1, "KL": 2}
"""Row number modulo 4; 3 is neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One comparison."""

    what: str
    error: float
    """Norm of the difference; of everything, where zeros are wanted."""
    allowed: float

    @property
    def ratio(self) -> float:
        """Error in units of what is allowed; above 1 is a failure, and so is NaN."""
        if self.error == 0:
            return 0.0
        ratio = self.error / self.allowed if self.allowed > 0 else math.inf
        return ratio if math.isfinite(ratio) else math.inf


def tolerance(case: Case, device: torch.device, base: float, dtype: torch.dtype) -> float:
    """Relative error allowed of what is computed in float32 and stored in `dtype`."""
    roundoff = UNIT_ROUNDOFF[dtype] * (2 if device.type == "cpu" else 1)
    if case.apart is not None:
        base *= max(1.0, 0.5 / case.apart)
    return base + roundoff


def compared(what: str, got: Tensor, want: Tensor, relative: float, floor: float = 0.0) -> Measure:
    """Norm of the difference against `relative` of the norm wanted; `floor` is per element."""
    want = want.double()
    error = torch.linalg.vector_norm(got.double() - want).item()
    granted = relative * torch.linalg.vector_norm(want).item() + floor * math.sqrt(want.numel())
    return Measure(what=what, error=error, allowed=granted)


def zeros(what: str, got: Tensor) -> Measure:
    """Exactly 0 everywhere."""
    return Measure(what=what, error=float((got != 0).sum().item()), allowed=0.0)


def compared_by_kind(
    what: str, got: Tensor, want: Tensor, kind: Tensor, relative: float, floor: float = 0.0
) -> Iterator[Measure]:
    """Each kind of rows apart, and zeros in rows of no kind."""
    for name, number in KINDS.items():
        at = kind == number
        if want[at].any():
            yield compared(f"{what} of {name} rows", got[at], want[at], relative, floor)
        else:
            yield zeros(f"{what} of {name} rows", got[at])
    yield zeros(f"{what} of skipped rows", got[kind == 3])


def compared_logits_grad(
    got: Tensor, want: Tensor, inputs: Inputs, relative: float, floor: float, columns: int
) -> Iterator[Measure]:
    """Gradient in raw logits by kind and set of columns, and zeros in padding and skipped rows."""
    has_labels = bool((inputs.labels >= 0).any())
    for name, number in KINDS.items():
        at = inputs.kind == number
        if not want[at].any():
            yield zeros(f"gradient of {name} rows", got[at])
            continue
        ours, truth = got[at, :columns].double(), want[at, :columns].clone()
        sets = {"label": inputs.labels[at, None].clamp_min(0), "peaks": inputs.peaks[at]}
        for of, ids in sets.items():
            if of == "peaks" or (has_labels and number <= 1):
                pair = ours.gather(1, ids), truth.gather(1, ids)
                yield compared(f"gradient of {name} rows, {of}", *pair, relative, floor)
                ours.scatter_(1, ids, 0.0)
                truth.scatter_(1, ids, 0.0)
        begin = columns - max(1, int(columns * LAST_COLUMNS))
        for of, part in (("last", slice(begin, None)), ("rest", slice(0, begin))):
            pair = ours[:, part], truth[:, part]
            yield compared(f"gradient of {name} rows, {of} columns", *pair, relative, floor)
    yield zeros("gradient of skipped rows", got[inputs.kind == 3])
    if columns < got.shape[1]:
        yield zeros("gradient of padding", got[:, columns:])


def worst(measures: list[Measure]) -> Measure:
    """The one nearest to, or furthest beyond, what is allowed."""
    return max(measures, key=lambda measure: measure.ratio)
