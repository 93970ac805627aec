"""Time and peak memory of our kernels and losses, against the machine's limits and against others.

    python benchmarks/bench_kernels.py STAGE --device cuda|cpu --out FILE.csv

Stages, as `gpu_check.sh` runs them:

    parts       copy bandwidth and rate of a large matrix product; then each kernel alone against
                the bytes it must move, and each product against its FLOPs
    linear      linear_ce_kl and linear_cross_entropy against the bare products, turn by turn
    masked_kl   forward, reverse and jsd from two logits tensors
    chunks      linear_ce_kl over chunk sizes; and what makes the host wait in one call, counted
                in a trace
    peers       other implementations; `compiled` those that compile first

A loss is timed only if it agrees with float64 (`problems`); ours that does not is exit status 1.
Both limits are measured in turn with the rest, so percentages hold for the clocks of the moment.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import parts
import torch
from harness import Call, Limit, copy_limit, matmul_limit, measure_interleaved, provenance
from host_waits import count_waits
from peers import (
    COMPILED_LINEAR_LOSSES,
    COMPILED_LOGITS_LOSSES,
    LINEAR_LOSSES,
    LOGITS_LOSSES,
    OURS,
    Losses,
    ours_cross_entropy,
    ours_linear,
    ours_masked_kl,
    status_of,
    value_and_gradients,
)
from problems import AGREES_WITHIN, OURS_WITHIN, LinearProblem, LogitsProblem, Truth, truth_of
from result_rows import Rows

PRODUCTS = "bare products"
_LIMIT = "limit of the machine"
_PASSES = 5  # forward reads two logits tensors, backward reads them again and writes one
_CHUNKS = (832, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Shapes of one run."""

    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    chunk_tokens: int | None = None
    """Of the losses; None = their default."""
    block_rows: int
    """Rows whose logits are formed at a time, in the kernels and products alone."""

    def linear(self, device: torch.device, fraction: float, *, is_trained: bool) -> LinearProblem:
        """The problem of `linear_ce_kl` with a divergence on so many of the rows."""
        return LinearProblem.random(
            (self.tokens, self.vocab, self.hidden),
            self.dtype,
            device,
            num_active=round(fraction * self.tokens),
            is_trained=is_trained,
            chunk_tokens=self.chunk_tokens,
        )


SIZES = {
    "cuda": Sizes(tokens=8192, vocab=128256, hidden=4096, dtype=torch.bfloat16, block_rows=1024),
    # Chunks of 32 tokens, so that what works in chunks has several here as well.
    "cpu": Sizes(
        tokens=128, vocab=4096, hidden=128, dtype=torch.float32, chunk_tokens=32, block_rows=32
    ),
}


class Work(NamedTuple):
    """A call, and what it must do at least: bytes or FLOPs, in the unit of its group's limit."""

    call: Call
    amount: float
    columns: Mapping[str, Any] = {}


class Bench:
    """Measures groups of calls, and adds a row for each."""

    def __init__(self, stage: str, device: torch.device, rows: Rows) -> None:
        self.stage, self.device, self.rows = stage, device, rows
        self.sizes = SIZES[device.type]
        self.is_good = True
        """False once one of ours has disagreed with float64."""

    def group(self, works: Mapping[str, Work], limit: Limit, **columns: Any) -> None:
        """Times the calls in turn with the limit, of which each row says its share."""
        calls = {name: work.call for name, work in works.items()}
        measured = measure_interleaved({**calls, _LIMIT: limit.call}, self.device)
        rate = limit.work / measured[_LIMIT].median_ms  # per millisecond
        amount_column = "bytes" if "bytes" in limit.rate_column else "flops"
        for name, work in works.items():
            median = measured[name].median_ms
            row = {"status": "ok", **columns, **work.columns, **asdict(measured[name])}
            row |= {amount_column: round(work.amount), "floor_ms": work.amount / rate}
            row[limit.percent_column] = 100 * row["floor_ms"] / median
            row[limit.rate_column] = rate * 1e3
            for other, column in ((OURS, "ratio_to_ours"), (PRODUCTS, "ratio_to_products")):
                if other in measured and len(works) > 1:
                    row[column] = median / measured[other].median_ms
            self.rows.add(implementation=name, **row)

    def compare(
        self,
        problem: LogitsProblem | LinearProblem,
        losses: Losses,
        limit: Limit,
        amount: float,
        *,
        others: Mapping[str, Work] | None = None,
        **columns: Any,
    ) -> None:
        """Times the losses that agree with float64, and says why the others have no figure."""
        torch.compiler.reset()  # or later shapes hit the limit on compilations, and run eagerly
        truth, works = truth_of(problem), {}
        for name, make in losses.items():
            clear(self.device)
            gap, status = None, ""
            try:
                call = value_and_gradients(make(), problem)
                gap = _gap(call, truth)
            except Exception as error:
                if name == OURS:
                    raise
                status = status_of(error)
            limit_of = OURS_WITHIN if name == OURS else AGREES_WITHIN
            checked = {"gap": gap, "gap_limit": limit_of[self.sizes.dtype]}
            if gap is not None and gap <= checked["gap_limit"]:
                works[name] = Work(call, amount, checked)
                continue
            self.is_good &= name != OURS
            status = status or f"differs from float64 by {gap:.2g}"
            self.rows.add(implementation=name, status=status, **columns, **checked)
        clear(self.device)
        self.group({**works, **(others or {})}, limit, **columns)


def _gap(call: Callable[[], tuple[torch.Tensor, ...]], truth: Truth) -> float:
    loss, *gradients = call()
    return truth.gap(loss, gradients)


def clear(device: torch.device) -> None:
    """Gives back what is no longer held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bench_parts(bench: Bench) -> None:
    """The two ceilings that every other figure is a share of; kernels and products alone."""
    _limits(bench)
    _kernels(bench)
    _products(bench)


def _limits(bench: Bench) -> None:
    for limit, name in (
        (copy_limit(bench.device), "copy"),
        (matmul_limit(bench.device), "matrix product"),
    ):
        [found] = measure_interleaved({name: limit.call}, bench.device).values()
        rate = limit.work / found.median_ms * 1e3
        bench.rows.add(
            implementation="torch",
            what=f"{name}, {rate / 1e12:.3g} T/s",
            status="ok",
            **asdict(found),
            **{limit.rate_column: rate},
        )


def _kernels(bench: Bench) -> None:
    sizes, limit = bench.sizes, copy_limit(bench.device)
    for rows, dtype, with_ce in (
        (sizes.tokens, sizes.dtype, False),  # as masked_kl calls them
        (sizes.block_rows, torch.float32, True),  # as linear_ce_kl does
    ):
        clear(bench.device)
        shape = (rows, sizes.vocab)
        for part in parts.kernels(shape, dtype, sizes.dtype, bench.device, with_ce=with_ce):
            work = {OURS: Work(part.call, part.amount)}
            name = str(dtype).removeprefix("torch.")
            bench.group(work, limit, what=f"{part.name}, {rows} rows", N=rows, dtype=name)


def _products(bench: Bench) -> None:
    sizes, limit = bench.sizes, matmul_limit(bench.device)
    for rows in (sizes.block_rows, sizes.tokens):
        clear(bench.device)
        problem = sizes.linear(bench.device, 1.0, is_trained=True)
        for part in parts.products(problem, rows):
            work = {PRODUCTS: Work(part.call, part.amount)}
            bench.group(work, limit, what=f"{part.name}, {rows} rows", N=rows, H=sizes.hidden)


def bench_masked_kl(bench: Bench) -> None:
    """Value and gradient from two logits tensors."""
    _compare_logits(bench, ("forward", "reverse", "jsd"), {OURS: lambda: ours_masked_kl})


def _compare_logits(bench: Bench, directions: tuple[str, ...], losses: Losses) -> None:
    sizes, limit = bench.sizes, copy_limit(bench.device)
    for direction in directions:
        clear(bench.device)
        shape = (sizes.tokens, sizes.vocab)
        problem = LogitsProblem.random(shape, sizes.dtype, bench.device, direction)
        amount = _PASSES * problem.policy.numel() * problem.policy.element_size()
        bench.compare(
            problem, losses, limit, amount, what=f"masked_kl {direction}", active_fraction=1.0
        )


def bench_linear(bench: Bench) -> None:
    """Our losses against the products that no implementation can do without."""
    for head in ("trained", "frozen"):
        for fraction in (1.0, 0.1, 0.0):
            _compare_linear(bench, head, fraction, {OURS: lambda: ours_linear}, name="linear_ce_kl")
        losses = {OURS: lambda: ours_cross_entropy}
        _compare_linear(bench, head, 0.0, losses, name="linear_cross_entropy")


def _compare_linear(
    bench: Bench, head: str, fraction: float, losses: Losses, *, name: str | None = None
) -> None:
    clear(bench.device)
    sizes, limit = bench.sizes, matmul_limit(bench.device)
    problem = sizes.linear(bench.device, fraction, is_trained=head == "trained")
    amount = 2 * problem.num_products * sizes.tokens * sizes.vocab * sizes.hidden
    bench.compare(
        problem,
        losses,
        limit,
        amount,
        others={PRODUCTS: Work(parts.all_products(problem, sizes.block_rows), amount)},
        what=name or ("ce + kl" if fraction > 0 else "ce"),
        active_fraction=fraction,
        head=head,
        H=sizes.hidden,
    )


def bench_chunks(bench: Bench) -> None:
    """Time and peak memory of `linear_ce_kl` over chunk sizes, its default among them; waits."""
    _chunks(bench)
    _waits(bench)


def _chunks(bench: Bench) -> None:
    sizes, limit = bench.sizes, matmul_limit(bench.device)
    problem = sizes.linear(bench.device, 1.0, is_trained=True)
    amount = 2 * problem.num_products * sizes.tokens * sizes.vocab * sizes.hidden
    # By name, since all are ours; the default has the name that the others are compared with.
    chosen = {OURS: None, **{f"ours, chunk {size}": size for size in chunk_sizes(sizes)}}
    works = {PRODUCTS: Work(parts.all_products(problem, sizes.block_rows), amount)}
    for name, chunk_tokens in chosen.items():
        call = value_and_gradients(parts.linear_in_chunks(chunk_tokens), problem)
        works[name] = Work(call, amount, {"chunk_tokens": chunk_tokens})
    bench.group(
        works,
        limit,
        what="linear_ce_kl chunks",
        active_fraction=1.0,
        head="trained",
        H=sizes.hidden,
    )


def chunk_sizes(sizes: Sizes) -> tuple[int, ...]:
    """The sweep, scaled down with the number of tokens."""
    return tuple(max(1, size * sizes.tokens // _CHUNKS[-1]) for size in _CHUNKS)


def _waits(bench: Bench) -> None:
    """Where the host waits for the device within one call of value and gradients."""
    clear(bench.device)
    for name, call, expected in parts.watched_calls(bench.sizes, bench.device):
        if bench.device.type != "cuda":
            bench.rows.add(implementation=OURS, what=name, status="needs CUDA")
            continue
        found = count_waits(call)
        status = "ok" if found.total <= expected else f"expected at most {expected}"
        bench.rows.add(
            implementation=OURS, what=name, status=f"{status}: {found.text}", count=found.total
        )


def bench_peers(bench: Bench) -> None:
    """What needs no compilation; last the cross-entropies, of which some look for settings long."""
    for fraction in (1.0, 0.1):
        _compare_linear(bench, "trained", fraction, LINEAR_LOSSES)
    _compare_logits(bench, ("forward", "jsd"), LOGITS_LOSSES)
    _compare_linear(bench, "trained", 0.0, LINEAR_LOSSES)


def bench_compiled(bench: Bench) -> None:
    """What compiles for its first value."""
    _compare_linear(bench, "trained", 1.0, COMPILED_LINEAR_LOSSES)
    if bench.device.type == "cpu":
        return  # enough to know that it works: the rest would only compile
    _compare_logits(bench, ("forward",), COMPILED_LOGITS_LOSSES)
    _compare_linear(bench, "trained", 0.0, COMPILED_LINEAR_LOSSES)


STAGES: dict[str, Callable[[Bench], None]] = {
    "parts": bench_parts,
    "linear": bench_linear,
    "masked_kl": bench_masked_kl,
    "chunks": bench_chunks,
    "peers": bench_peers,
    "compiled": bench_compiled,
}


def main() -> int:
    """Runs one stage; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="CSV to which rows are added")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    sizes = SIZES[device.type]
    common = {
        "stage": arguments.stage,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "N": sizes.tokens,
        "V": sizes.vocab,
    }
    bench = Bench(arguments.stage, device, Rows(arguments.out, **provenance(device), **common))
    STAGES[arguments.stage](bench)
    return 0 if bench.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
