"""`Recorder`: counts FLOPs, collectives and seconds of the code in its block, by region.

It observes operators at torch's dispatcher, below every library. Counting changes no result: the
same operators run in the same order.
"""

import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from safereg_dist import regions
from safereg_dist.profiling.operators import flops_of, is_composite, payload_of
from safereg_kernels import flops as kernel_flops
from safereg_kernels.flops import HeadFlops


@dataclass(slots=True)
class PartCost:
    """The cost of one region on this rank."""

    flops: int = 0
    """FLOPs of matrix products and attention; a multiply-add counts as two."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Payload of collectives by kind (see `operators`)."""
    calls: Counter[str] = field(default_factory=Counter)
    """Number of collectives by kind."""
    seconds: float = 0.0
    """Wall time without nested regions; on CUDA the device is synchronised where a region begins
    and ends, so that its work is billed to the region that launched it."""
    peak_memory_bytes: int = 0
    """Peak memory of this process when the region last ended: allocated on the device (since the
    recorder began), or resident if there is no device (since the process began)."""

    @property
    def total_bytes(self) -> int:
        """Payload of all kinds of collectives."""
        return sum(self.bytes.values())


class Recorder:
    """A block whose work is counted: `with Recorder() as recorder: ...`, then `totals()`.

    Only one can be active in a process. In other threads it counts the FLOPs of regions that begin
    in the block (a local judge runs in a thread), but no time: the step does not wait for them.
    """

    def __init__(self) -> None:
        self._costs: dict[str, PartCost] = {}
        self._open: list[str] = []
        self._thread = 0
        self._mark = 0.0
        self._is_in_operator = False
        self._elsewhere = threading.local()
        self._closing = ExitStack()

    def __enter__(self) -> "Recorder":
        self._thread = threading.get_ident()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with ExitStack() as stack:
            before = regions.listen(self)
            stack.callback(regions.listen, before)
            stack.enter_context(kernel_flops.listening(self))
            stack.enter_context(_Watch(self, None))
            self._closing = stack.pop_all()
        self._mark = _now()
        return self

    def __exit__(self, *error: object) -> None:
        self._bill_time()
        self._closing.close()

    def totals(self) -> dict[str, PartCost]:
        """Cost of every region that was entered, in the order of `regions.REGIONS`."""
        known = sorted(self._costs, key=regions.REGIONS.index)
        return {name: self._costs[name] for name in known}

    @property
    def flops(self) -> int:
        """FLOPs of all regions."""
        return sum(cost.flops for cost in self._costs.values())

    @property
    def total_bytes(self) -> int:
        """Payload of all collectives."""
        return sum(cost.total_bytes for cost in self._costs.values())

    @property
    def safety_bytes(self) -> int:
        """Payload of the collectives that plain fine-tuning does not have."""
        return sum(c.total_bytes for name, c in self._costs.items() if name in regions.SAFETY_PATH)

    # regions.RegionListener

    def enter(self, name: str) -> None:
        """Bills subsequent work to region `name`."""
        if threading.get_ident() == self._thread:
            self._bill_time()
            self._open.append(name)
            return
        watch = _Watch(self, name)  # modes belong to a thread
        watch.__enter__()
        self._elsewhere.open = [*getattr(self._elsewhere, "open", ()), watch]

    def leave(self) -> None:
        """Bills subsequent work to the enclosing region."""
        if threading.get_ident() == self._thread:
            self._bill_time()
            self._open.pop()
            return
        self._elsewhere.open.pop().__exit__(None, None, None)

    # safereg_kernels.flops.FlopListener

    @contextmanager
    def operator(self, flops: HeadFlops) -> Iterator[None]:
        """Bills a fused operator by its formula instead of by its products."""
        self._cost(regions.HEAD_CE).flops += flops.cross_entropy
        self._cost(regions.HEAD_DIVERGENCE).flops += flops.divergence
        before, self._is_in_operator = self._is_in_operator, True
        try:
            yield
        finally:
            self._is_in_operator = before

    def divergence(self) -> regions.region:
        """A context manager that bills time to the divergence."""
        return regions.region(regions.HEAD_DIVERGENCE)

    # from _Watch

    def see(self, operator: Any, args: Any, kwargs: Any, out: Any, elsewhere: str | None) -> None:
        """Counts one call of an operator packet; `elsewhere` is the region of another thread."""
        name = elsewhere or (self._open[-1] if self._open else regions.OTHER)
        payload = payload_of(operator, args)
        if payload is not None:
            kind, size = payload
            self._cost(name).bytes[kind] += size
            self._cost(name).calls[kind] += 1
        elif elsewhere or not self._is_in_operator:
            flops = flops_of(operator, args, kwargs, out)
            if flops:
                self._cost(name).flops += flops

    def _cost(self, name: str) -> PartCost:
        return self._costs.setdefault(name, PartCost())

    def _bill_time(self) -> None:
        now = _now()
        cost = self._cost(self._open[-1] if self._open else regions.OTHER)
        cost.seconds += now - self._mark
        cost.peak_memory_bytes = max(cost.peak_memory_bytes, _peak_memory_bytes())
        self._mark = now


class _Watch(TorchDispatchMode):
    """Reports the operators of one thread to the recorder."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder, elsewhere: str | None) -> None:
        """`elsewhere` is the region of another thread; None = the recorder's own thread."""
        super().__init__()
        self._recorder = recorder
        self._elsewhere = elsewhere

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator) or func.namespace == "prim":
            return func(*args, **kwargs)
        if is_composite(func):  # inference mode does not decompose it: its products are inside
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self._recorder.see(func.overloadpacket, args, kwargs, out, self._elsewhere)
        return out


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
