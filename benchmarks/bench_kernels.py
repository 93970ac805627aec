"""Time and peak memory of our losses next to those of others: python benchmarks/bench_kernels.py.

First ours is held against a float64 computation on small shapes (exit status 1 where it disagrees);
then a loss and its gradients are timed, all implementations in one process, turn by turn:

    masked_kl       from two logits tensors, forward and reverse
    ce + kl         from hidden states: cross-entropy on all rows, divergence on all or 10 % of them
    ce              the same without a divergence: what the 10 % are to be compared with

each with a trained and with a frozen head. A peer is timed only if its loss and its gradient agree
with ours. Percent of the copy bandwidth: 5 passes over a [N, V] tensor, which is what `masked_kl`
must read and write. Percent of the matmul rate: the products no implementation can do without, one
of [N, V, H] for the policy, one for each gradient, one over the active rows for the reference. Both
limits are measured in turn with the rest.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    Limit,
    copy_limit,
    matmul_limit,
    measure_interleaved,
    print_table,
    provenance,
    write_csv,
)
from peers import LINEAR_LOSSES, LOGITS_LOSSES, OURS, LinearProblem, LogitsProblem, status_of
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from safereg_kernels import linear_ce_kl, masked_kl

RESULTS = Path(__file__).resolve().parent / "results" / "kernels"
AGREES_WITHIN = 0.1
"""Relative difference of loss and gradient up to which a peer computes the same: Liger's chunked
loss rounds its logits to bfloat16, which alone is some percent."""
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative to the norm; a bfloat16 gradient is rounded to 8 bits."""
_LIMIT = "limit of the machine"
_PASSES = 5  # forward reads two logits tensors, backward reads them again and writes one


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Shapes of one run."""

    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    chunk_tokens: int | None = None


SIZES = {
    ("cuda", False): Sizes(tokens=8192, vocab=128256, hidden=4096, dtype=torch.bfloat16),
    ("cuda", True): Sizes(tokens=2048, vocab=32000, hidden=1024, dtype=torch.bfloat16),
    # Chunks of 64 tokens, so that what works in chunks has several here as well.
    ("cpu", False): Sizes(tokens=256, vocab=8192, hidden=256, dtype=torch.float32, chunk_tokens=64),
    ("cpu", True): Sizes(tokens=128, vocab=4096, hidden=128, dtype=torch.float32, chunk_tokens=64),
}
"""By device and --quick."""


class Bench:
    """The rows of one run, written after each group, so that a run cut short leaves what it has."""

    def __init__(self, sizes: Sizes, device: torch.device, out: Path, bar: tqdm) -> None:
        self.sizes, self.device, self.bar = sizes, device, bar
        self._out = out
        self._common = {
            **provenance(device),
            "dtype": str(sizes.dtype).removeprefix("torch."),
            "N": sizes.tokens,
            "V": sizes.vocab,
        }
        self.rows: list[dict[str, Any]] = []

    def group(
        self,
        problem: Any,
        makers: Mapping[str, Callable[[], Callable[[Any], Tensor]]],
        limit: Limit,
        work: int,
        **columns: Any,
    ) -> None:
        """Measures every implementation on one problem of so many bytes or operations."""
        self.bar.set_description(" ".join(map(str, columns.values())))
        calls, status = self._ready(problem, makers)
        # The limit has its turn as well, or drift would let a call exceed it.
        measured = measure_interleaved({**calls, _LIMIT: limit.call}, self.device, self.bar.update)
        rate = limit.work / measured[_LIMIT].median_ms  # per millisecond
        for name in makers:
            row = {**self._common, **columns, "implementation": name, "status": status[name]}
            if name in measured:
                row |= asdict(measured[name])
                row["ratio_to_ours"] = row["median_ms"] / measured[OURS].median_ms
                row[limit.percent_column] = 100 * work / row["median_ms"] / rate
                row[limit.rate_column] = rate * 1e3
            self.rows.append(row)
        write_csv(self.rows, self._out)

    def _ready(
        self, problem: Any, makers: Mapping[str, Callable[[], Callable[[Any], Tensor]]]
    ) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
        """(what to time, status of all): each has run once and agreed with ours."""
        torch.compiler.reset()  # or later shapes hit the limit on compilations, and run eagerly
        calls: dict[str, Callable[[], Any]] = {}
        status: dict[str, str] = {}
        expected: tuple[Tensor, ...] | None = None
        for name, make in makers.items():
            try:
                call = _value_and_gradients(make(), problem)
                found = call()
            except Exception as error:
                if name == OURS:
                    raise
                status[name] = status_of(error)
                self.bar.write(f"{name}: {status[name]}")
            else:
                expected = expected or found
                gap = max(map(relative_gap, found, expected))
                status[name] = "ok" if gap < AGREES_WITHIN else f"differs by {gap:.2g}"
                if status[name] == "ok":
                    calls[name] = call
                del found
            if self.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        return calls, status


def _value_and_gradients(
    loss: Callable[[Any], Tensor], problem: Any
) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        value = loss(problem)
        return value.detach(), *torch.autograd.grad(value, problem.leaves)

    return call


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by the norm of what is expected."""
    dtype = torch.promote_types(expected.dtype, torch.float32)  # in which the squares are summed
    gap, size = (torch.linalg.vector_norm(t, dtype=dtype) for t in (found - expected, expected))
    return float(gap / size)


def bench_masked_kl(bench: Bench) -> None:
    """Value and gradient from two logits tensors."""
    sizes = bench.sizes
    shape = (sizes.tokens, sizes.vocab)
    policy, reference = (
        torch.randn(shape, device=bench.device, dtype=sizes.dtype).mul_(2) for _ in range(2)
    )
    limit = copy_limit(bench.device)
    for direction in ("forward", "reverse"):
        problem = LogitsProblem(
            policy=policy.requires_grad_(),
            reference=reference,
            weights=torch.full((sizes.tokens,), 1 / sizes.tokens, device=bench.device),
            direction=direction,
        )
        bytes_moved = _PASSES * policy.numel() * policy.element_size()
        what = f"masked_kl {direction}"
        bench.group(problem, LOGITS_LOSSES, limit, bytes_moved, what=what, active_fraction=1.0)


def bench_linear(bench: Bench) -> None:
    """Loss and gradients from hidden states, over heads and active fractions."""
    sizes, limit = bench.sizes, matmul_limit(bench.device)
    for head in ("trained", "frozen"):
        for fraction in (1.0, 0.1, 0.0):
            problem = LinearProblem.random(
                (sizes.tokens, sizes.vocab, sizes.hidden),
                sizes.dtype,
                bench.device,
                num_active=round(fraction * sizes.tokens),
                is_trained=head == "trained",
                chunk_tokens=sizes.chunk_tokens,
            )
            num_products = 2 + (head == "trained") + fraction
            bench.group(
                problem,
                LINEAR_LOSSES,
                limit,
                round(2 * num_products * sizes.tokens * sizes.vocab * sizes.hidden),
                what="ce + kl" if fraction > 0 else "ce",
                active_fraction=fraction,
                head=head,
                H=sizes.hidden,
            )


def check_kernels(device: torch.device) -> bool:
    """Ours against float64 on small shapes, rows of weight 0 among them; prints what it finds."""
    is_good = True
    for dtype in [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]:
        for direction in ("forward", "reverse", "l2"):
            for check in (_check_masked_kl, _check_linear_ce_kl):
                gap = check(device, dtype, direction)
                is_within = gap <= CHECK_TOLERANCE[dtype]
                is_good &= is_within
                name = f"{check.__name__.removeprefix('_check_')} {direction} {dtype}"
                print(f"{'ok  ' if is_within else 'FAIL'} {name}: off float64 by {gap:.1e}")
    return is_good


def _check_masked_kl(device: torch.device, dtype: torch.dtype, direction: str) -> float:
    x, y = (torch.randn(24, 5000).to(device, dtype) for _ in range(2))
    weights = (torch.rand(24) * (torch.arange(24) % 3 > 0)).to(device)
    x.requires_grad_()
    ours = masked_kl(x, y, weights, direction=direction, temperature=1.3)[0]
    exact = _divergence(x.double() / 1.3, y.double() / 1.3, direction) @ weights.double()
    return _largest_gap(ours, exact, [x])


def _check_linear_ce_kl(device: torch.device, dtype: torch.dtype, direction: str) -> float:
    problem = LinearProblem.random(
        (24, 5000, 32), dtype, device, num_active=16, is_trained=True, chunk_tokens=10
    )
    ce_weights = problem.ce_weights * (torch.arange(24) % 4 > 0)
    ours = linear_ce_kl(
        problem.hidden,
        problem.head,
        problem.labels,
        ce_weights=ce_weights,
        kl_weights=problem.kl_weights,
        reference_hidden=problem.reference_hidden,
        reference_head=problem.reference_head,
        direction=direction,
        chunk_tokens=problem.chunk_tokens,
    )[0]
    x = problem.hidden.double() @ problem.head.double().T
    y = problem.reference_hidden.double() @ problem.reference_head.double().T
    exact = cross_entropy(x, problem.labels, reduction="none") @ ce_weights.to(x)
    exact = exact + _divergence(x, y, direction) @ problem.kl_weights.to(x)
    return _largest_gap(ours, exact, problem.leaves)


def _divergence(x: Tensor, y: Tensor, direction: str) -> Tensor:
    """Of each row, by its definition and autograd."""
    if direction == "l2":
        return (x - y).var(-1, correction=0)
    a, b = x.log_softmax(-1), y.log_softmax(-1)
    u, w = (b, a) if direction == "forward" else (a, b)
    return (u.exp() * (u - w)).sum(-1)


def _largest_gap(ours: Tensor, exact: Tensor, leaves: list[Tensor]) -> float:
    found = [ours.detach(), *torch.autograd.grad(ours, leaves)]
    expected = [exact.detach(), *torch.autograd.grad(exact, leaves)]
    return max(map(relative_gap, found, expected))


def main() -> int:
    """Checks, measures, writes; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="CSV (default results/kernels/DEVICE.csv)")
    parser.add_argument("--quick", action="store_true", help="smaller shapes")
    parser.add_argument("--check-only", action="store_true", help="no timing")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    if not check_kernels(device):
        return 1
    if arguments.check_only:
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: interpreted kernels are checked, not timed")
        return 2
    with tqdm(unit=" rounds", mininterval=1) as bar:
        out = arguments.out or RESULTS / f"{device.type}.csv"
        bench = Bench(SIZES[device.type, arguments.quick], device, out, bar)
        bench_masked_kl(bench)
        bench_linear(bench)
    print_table(bench.rows)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
