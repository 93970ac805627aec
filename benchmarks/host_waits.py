"""Counts, in a profiler's trace, what makes the host wait for the device within one call."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_CALL = "safereg watched call"
_RUNTIME = ("cuda_runtime", "cuda_driver")
_SYNCHRONISES = ("Synchronize",)
"""cudaStreamSynchronize, cudaDeviceSynchronize, cudaEventSynchronize, and the driver's."""


class Waits(NamedTuple):
    """Calls of the CUDA runtime that wait, by name."""

    by_name: dict[str, int]

    @property
    def total(self) -> int:
        """All of them; a copy that waits by a synchronisation of its own is one."""
        return max(
            sum(n for name, n in self.by_name.items() if name.startswith("cu")),
            sum(n for name, n in self.by_name.items() if name.startswith("Memcpy")),
        )

    @property
    def text(self) -> str:
        """As people read it."""
        return ", ".join(f"{n} {name}" for name, n in self.by_name.items()) or "no waits"


def count_waits(call: Callable[[], Any]) -> Waits:
    """Those of one call on CUDA, after two to warm up."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(_CALL):
            kept = call()
        torch.cuda.synchronize()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return waits_of(trace["traceEvents"])


def waits_of(events: list[dict[str, Any]]) -> Waits:
    """Waits among the events of a Chrome trace, in the time of the watched call.

    A synchronisation is one, and so is a plain cudaMemcpy; copies to the host, and from or to
    memory that is not pinned (for which the driver may wait for the stream), are counted by what
    was copied, and belong to the call if what started them does.
    """
    [span] = [e for e in events if e.get("name") == _CALL and e.get("cat") == "user_annotation"]
    begin, end = span["ts"], span["ts"] + span["dur"]
    inside = [
        e for e in events if e.get("cat") in _RUNTIME and begin <= e.get("ts", begin - 1) <= end
    ]
    started = {e.get("args", {}).get("correlation") for e in inside}
    names = [e["name"] for e in inside if is_wait(e["name"])]
    names += [
        e["name"]
        for e in events
        if e.get("cat") == "gpu_memcpy"
        and e.get("args", {}).get("correlation") in started
        and ("DtoH" in e["name"] or "Pageable" in e["name"])
    ]
    return Waits(dict(Counter(names)))


def is_wait(name: str) -> bool:
    """Whether a call of this name returns only when the device has done its work."""
    return any(part in name for part in _SYNCHRONISES) or (
        name.startswith(("cudaMemcpy", "cuMemcpy")) and "Async" not in name
    )
