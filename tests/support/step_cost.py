"""What an optimizer step costs in any stack: FLOPs, bytes, and what our code waits for."""

import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

import safereg_dist
import safereg_kernels
from safereg_dist.profiling.recorder import Recorder

OURS = tuple(str(Path(str(p.__file__)).parent) for p in (safereg_dist, safereg_kernels))
TORCH = str(Path(str(torch.__file__)).parent)
WAITING = (
    *("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"),
    "nonzero",
)
"""Methods of a tensor whose result the host reads: on a GPU it waits for the device."""


class StepCost:
    """Counts between `begin` and `end` of one step; None = of no step."""

    def __init__(self, step: int | None) -> None:
        self.found: dict[str, Any] = {}
        """`flops` and `bytes` of each region, and `waits` of our own code by where they are."""
        self._step = step
        self._open = ExitStack()

    def begin(self, step: int) -> None:
        """Called at the begin of every step."""
        if step != self._step:
            return
        self._waits = self._open.enter_context(_Waits())
        self._recorder = self._open.enter_context(Recorder())

    def end(self, step: int) -> None:
        """Called at the end of every step."""
        if step != self._step:
            return
        self._open.close()
        totals = self._recorder.totals()
        self.found = {
            "flops": {name: cost.flops for name, cost in totals.items()},
            "bytes": {name: dict(cost.bytes) for name, cost in totals.items()},
            "waits": self._waits.places,
        }

    def write(self, out: Path, rank: int) -> None:
        """Keeps what was found on a rank beside its result."""
        _file(out, rank).write_text(json.dumps(self.found))


class RanksCost(NamedTuple):
    """The cost of a step, summed over ranks."""

    flops: Counter[str]
    """By region."""
    bytes: Counter[str]
    """By region."""
    waits: Counter[str]
    """Of our own code, by where they are."""


def read_cost(out: Path, ranks: int) -> RanksCost:
    """What the ranks of a run have kept."""
    total = RanksCost(Counter(), Counter(), Counter())
    for rank in range(ranks):
        found = json.loads(_file(out, rank).read_text())
        total.flops.update(found["flops"])
        total.bytes.update({name: sum(kinds.values()) for name, kinds in found["bytes"].items()})
        total.waits.update(found["waits"])
    return total


def _file(out: Path, rank: int) -> Path:
    return out.with_suffix(f".cost-{rank}.json")


class _Waits(TorchFunctionMode):
    """Notes where our own code calls one of `WAITING`."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITING:
            frame = sys._getframe(1)
            while frame.f_code.co_filename.startswith(TORCH) and frame.f_back is not None:
                frame = frame.f_back
            path = frame.f_code.co_filename
            if path.startswith(OURS):
                self.places.append(f"{Path(path).name}:{frame.f_code.co_name}")
        return func(*args, **(kwargs or {}))
