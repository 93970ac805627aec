"""What crosses between host and device during a call, from a profiler's trace (needs a GPU).

Claimed: weights, report and order that are on the host go over in one copy, nothing comes back, and
the host never waits for the device. Exact: the counts. `set_sync_debug_mode` does not see copies
from pageable memory, a trace does.
"""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from safereg_kernels import linear_ce_kl, masked_kl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, VOCAB, HIDDEN = 300, 5003, 64
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def inputs(weights_on: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden, reference = torch.randn(2, ROWS, HIDDEN, generator=generator).cuda().bfloat16()
    heads = torch.randn(2, VOCAB, HIDDEN, generator=generator).cuda().bfloat16()
    weights = (torch.rand(2, ROWS, generator=generator) - 0.3).clamp_min(0).to(weights_on)
    return {
        "policy_hidden": hidden.requires_grad_(),
        "policy_head": heads[0].clone().requires_grad_(),
        "labels": torch.randint(0, VOCAB, (ROWS,), generator=generator).cuda(),
        "ce_weights": weights[0],
        "kl_weights": weights[1],
        "reference_hidden": reference,
        "reference_head": heads[1],
    }


def trace(call: Any) -> dict[str, int]:
    """Number of events of each name, after a call that compiles all kernels."""
    call()
    torch.cuda.synchronize()
    # Whatever the profiler itself waits for comes after the mark.
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with torch.profiler.record_function("the call"):
            call()
        torch.cuda.synchronize()
    events = profiler.events()
    inside = next(event for event in events if event.name == "the call").time_range
    counts: dict[str, int] = {}
    for event in events:
        is_copy = event.name.startswith("Memcpy")
        if is_copy or inside.start <= event.time_range.start <= inside.end:
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


def total(counts: dict[str, int], *parts: str) -> int:
    return sum(count for name, count in counts.items() if any(part in name for part in parts))


@pytest.mark.parametrize("reported", [False, True])
def test_host_weights_cross_once_and_nothing_waits(reported: bool) -> None:
    given = inputs("cpu")
    report = torch.arange(ROWS) % 2 == 0 if reported else None

    def call() -> None:
        loss, _, _ = linear_ce_kl(**given, ce_report=report, chunk_tokens=64)
        loss.backward()

    counts = trace(call)
    assert total(counts, "Memcpy HtoD") <= 1, counts
    assert total(counts, "Memcpy DtoH") == 0, counts
    assert total(counts, *WAITS) == 0, counts


def test_device_weights_are_counted_in_one_wait() -> None:
    given = inputs("cuda")
    counts = trace(lambda: linear_ce_kl(**given)[0].backward())
    assert total(counts, "Memcpy DtoH") <= 1, counts
    assert total(counts, *WAITS) <= 1, counts


def test_masked_kl_never_waits() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, ROWS, VOCAB, generator=generator).cuda()
    weights = (torch.rand(ROWS, generator=generator) - 0.3).clamp_min(0).cuda()
    x.requires_grad_()
    counts = trace(lambda: masked_kl(x, y, weights)[0].backward())
    assert total(counts, "Memcpy HtoD", "Memcpy DtoH", *WAITS) == 0, counts
