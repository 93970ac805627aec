"""Measures time, peak memory and the machine's own limits, and writes them as one tidy CSV.

What is claimed: times are medians with 20 % and 80 % quantiles of single calls, taken in rounds in
which every implementation has its turn, in an order drawn anew, so that drift of clocks and heat
left by others hit all of them alike. On CUDA the L2 cache is overwritten before each call, and time
is the device's. Peak memory is what one call
holds at most beyond what was allocated before it. Each row is written and printed the moment it is
known, so a run cut short leaves what it has. A figure that was not measured is an empty cell.
"""

import csv
import functools
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

COLUMNS = [
    *("date", "hardware", "driver", "commit", "torch", "triton", "liger", "stage", "dtype"),
    *("N", "V", "H", "active_fraction", "head", "chunk_tokens", "implementation", "what"),
    *("status", "median_ms", "q20_ms", "q80_ms", "rounds", "peak_extra_bytes"),
    *("percent_of_copy_bandwidth", "percent_of_matmul_rate", "copy_bytes_per_s"),
    *("matmul_flops_per_s", "bytes", "flops", "floor_ms", "ratio_to_ours", "ratio_to_products"),
    *("ratio_to_sft", "peak_memory_bytes", "loss", "gap", "gap_limit", "count"),
]
"""Of the results of `gpu_check.sh`, all stages alike: what a stage does not know stays empty."""
SECONDS_PER_CALL = {"cuda": 1.0, "cpu": 0.2}
"""Time spent on the repetitions of one call, within the limits below."""
MIN_ROUNDS, MAX_ROUNDS = {"cuda": 5, "cpu": 3}, 50
WARM_UPS = {"cuda": 2, "cpu": 1}
_FLUSH_BYTES = 1 << 30
"""Several times the L2 cache of any GPU there is; to write it takes long enough for the host to be
ahead of the device when the timed call begins, as it is in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one call costs."""

    median_ms: float
    q20_ms: float
    q80_ms: float
    rounds: int
    peak_extra_bytes: int


def measure_interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int | None = None,
    is_queued: bool = True,
) -> dict[str, Measurement]:
    """Time and peak memory of each call, in rounds in which each has its turn.

    `rounds` None = as many for all as the slowest one has time for. `is_queued`: a GPU has other
    work when the call begins, as in the middle of a training step, so what the host does ahead of
    the device is not billed; False = the device is idle, as at the begin of a step.
    """
    peaks, wanted, draw = {}, {}, random.Random(0)
    for name, fn in calls.items():
        for _ in range(WARM_UPS[device.type]):
            fn()
        peaks[name] = peak_extra_bytes(fn, device)
        seconds = time_once(fn, device) / 1e3
        wanted[name] = round(SECONDS_PER_CALL[device.type] / max(seconds, 1e-6))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds = rounds or min(
        MAX_ROUNDS, max(MIN_ROUNDS[device.type], min(wanted.values(), default=0))
    )
    order = list(calls)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            samples[name].append(time_once(calls[name], device, is_queued=is_queued))
    return {
        name: Measurement(
            median_ms=statistics.median(times),
            q20_ms=statistics.quantiles(times, n=5, method="inclusive")[0],
            q80_ms=statistics.quantiles(times, n=5, method="inclusive")[3],
            rounds=rounds,
            peak_extra_bytes=peaks[name],
        )
        for name, times in samples.items()
    }


def time_once(fn: Call, device: torch.device, *, is_queued: bool = True) -> float:
    """Milliseconds of one call; on CUDA the device's, in which it waits for a host that is late."""
    gc.disable()  # a collection in between would be billed to the call
    try:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            _flush_buffer(device).zero_()
            if is_queued:
                torch.cuda._sleep(_QUEUED_CYCLES)
            begin.record()
            fn()
            end.record()
            torch.cuda.synchronize(device)
            return begin.elapsed_time(end)
        started = time.perf_counter()
        fn()
        return (time.perf_counter() - started) * 1e3
    finally:
        gc.enable()


_QUEUED_CYCLES = 10_000_000  # 5 ms at 2 GHz, more than any call's host work before its first kernel


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)


def peak_extra_bytes(fn: Call, device: torch.device) -> int:
    """Bytes of tensors that one call holds at most, beyond what was allocated before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _check_cpu_peak()
    return _cpu_peak(fn)


def _cpu_peak(fn: Call) -> int:
    """Highest sum of the allocator's events; scratch space inside BLAS is not among them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _without_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
    ):
        fn()
    results = getattr(profiler.profiler, "kineto_results", None)
    assert results is not None, "this torch has no allocator events in its profiler"
    changes = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """A block whose writes to stderr are lost: the profiler of torch 2.13 tells when it begins."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@functools.cache
def _check_cpu_peak() -> None:
    """The count is right: 2 MiB freed, then 1 + 4 MiB held at once, are 5 MiB."""

    def allocate() -> None:
        torch.empty(2 << 20, dtype=torch.int8)
        kept = torch.empty(1 << 20, dtype=torch.int8)
        kept = kept, torch.empty(4 << 20, dtype=torch.int8)

    counted = _cpu_peak(allocate)
    assert counted == 5 << 20, f"5 MiB were allocated, the profiler counts {counted} bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What the machine can do at most: a call to be timed among the others, and its work."""

    call: Call
    work: int
    """Bytes or floating-point operations of one call."""
    percent_column: str
    rate_column: str


def copy_limit(device: torch.device) -> Limit:
    """A copy of a large tensor; bytes read and bytes written both count."""
    size = (2 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return Limit(
        call=lambda: target.copy_(source),
        work=2 * size,
        percent_column="percent_of_copy_bandwidth",
        rate_column="copy_bytes_per_s",
    )


def matmul_limit(device: torch.device) -> Limit:
    """A large square product (bf16 on CUDA, float32 on a CPU)."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Limit(
        call=lambda: torch.mm(a, b, out=out),
        work=2 * side**3,
        percent_column="percent_of_matmul_rate",
        rate_column="matmul_flops_per_s",
    )


def provenance(device: torch.device) -> dict[str, Any]:
    """The columns that are the same for every row of a run."""
    return {
        "date": date.today().isoformat(),
        "hardware": hardware(device),
        "driver": driver(device),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "liger": installed("liger-kernel"),
    }


def hardware(device: torch.device) -> str:
    """Name of the GPU, or of the processor with the number of cores used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, cores used: {min(torch.get_num_threads(), os.cpu_count() or 1)}"


def processor() -> str:
    """Name of the processor, as the system gives it."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver(device: torch.device) -> str:
    """Version of the GPU's driver, empty where nvidia-smi does not tell."""
    if device.type != "cuda":
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.split("\n")[0].strip()


def commit() -> str:
    """Short hash of the commit, with `+` where files differ from it; empty outside of git."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def installed(package: str) -> str:
    """Version of a package, empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def write_csv(rows: Iterable[Mapping[str, Any]], path: Path, columns: list[str] = COLUMNS) -> None:
    """Writes the rows; a column that a row lacks stays empty, one that is not known is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: cell(value) for key, value in row.items()})


def cell(value: Any) -> Any:
    """A value as it stands in a CSV."""
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
