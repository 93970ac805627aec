"""`profile: true`: records every optimizer step by region, over all ranks, and prints a table.

`profile.jsonl` has one row per step and region, `profile.json` the run's totals with their shares,
`profile.png` the shares; all in the run folder. Sums are over ranks; the profiler's own collectives
are not recorded.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.profiling.figure import shares_png
from safereg_dist.profiling.operators import KINDS
from safereg_dist.profiling.recorder import PartCost, Recorder
from safereg_dist.profiling.table import profile_table
from safereg_dist.regions import REGIONS, SAFETY_PATH
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import parse_json

_NANOSECONDS = 10**9
_WIDTH = 3 + 2 * len(KINDS)  # numbers of one region on one rank, see `_numbers`

Row = dict[str, Any]
"""Cost of one region in one step, or in a run (see `_row`)."""


class Profiler:
    """Records optimizer steps; on the main rank it writes them to the run folder."""

    def __init__(self, folder: Path, ranks: Ranks, *, micro_batches: int, first_step: int) -> None:
        """`micro_batches` per rank and step; removes rows of steps from `first_step` on.

        Raises:
            CheckpointError: the profile of the run before its resumption cannot be read.
        Collectives: one gather of texts.
        """
        self._folder, self._ranks = folder, ranks
        self._micro_batches = micro_batches
        with self._files():
            if ranks.is_main:
                kept = [r for r in _read_rows(self._file) if r["step"] < first_step]
                write_atomically(self._file, "".join(_line(row) for row in kept).encode())

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """A block recorded as step `step`. Collectives, after it: one all-gather of integers, one
        gather of texts."""
        with Recorder() as recorder:
            yield
        table = self._ranks.gather(_numbers(recorder, self._ranks.device)).tolist()
        with self._files():
            if self._ranks.is_main:
                rows = self._rows(step, table)
                with self._file.open("a", encoding="utf-8") as file:
                    file.writelines(_line(row) for row in rows)

    def finish(self) -> None:
        """Writes totals and figure, prints the table. Collectives: one gather of texts."""
        with self._files():
            if self._ranks.is_main:
                profile = self._summary(_read_rows(self._file))
                text = json.dumps(profile, indent=2) + "\n"
                write_atomically(self._folder / "profile.json", text.encode())
                write_atomically(self._folder / "profile.png", shares_png(profile))
                print(profile_table(profile), flush=True)

    @contextmanager
    def _files(self) -> Iterator[None]:
        """A block whose file errors become CheckpointError on all ranks."""
        with self._ranks.together():
            try:
                yield
            except (OSError, ValueError, KeyError, TypeError) as err:
                raise CheckpointError(
                    f"the profile {self._file} cannot be read or written ({err}): remove it, free "
                    "the disk, or go on with profile=false"
                ) from err

    @property
    def _file(self) -> Path:
        return self._folder / "profile.jsonl"

    def _rows(self, step: int, table: Sequence[Sequence[int]]) -> list[Row]:
        """Rows of one step from every rank's numbers; regions that no rank entered have no row."""
        found = []
        for place, name in enumerate(REGIONS):
            own = [rank[place * _WIDTH : (place + 1) * _WIDTH] for rank in table]
            if any(any(numbers) for numbers in own):
                found.append({"step": step, **_row(name, own)})
        return [self._with_means(row, 1) for row in found]

    def _with_means(self, row: Row, steps: int) -> Row:
        passes = self._ranks.world_size * self._micro_batches * max(steps, 1)
        return {
            **row,
            "flops_per_rank_and_micro_batch": row["flops"] / passes,
            "bytes_per_rank_and_micro_batch": sum(row["bytes"].values()) / passes,
        }

    def _summary(self, rows: Sequence[Row]) -> Row:
        """The content of `profile.json`."""
        steps = len({row["step"] for row in rows})
        by_part = {
            name: {"is_safety_path": name in SAFETY_PATH, **_sum_of(own)}
            for name in REGIONS
            if (own := [row for row in rows if row["part"] == name])
        }
        total = _sum_of(rows)
        safety = _sum_of([row for row in rows if row["part"] in SAFETY_PATH])
        finished = {
            name: self._with_means({**cost, **_shares(cost, total)}, steps)
            for name, cost in {**by_part, "safety path": safety, "all": total}.items()
        }
        return {
            "steps": steps,
            "world_size": self._ranks.world_size,
            "micro_batches_per_rank_and_step": self._micro_batches,
            "device": _device_name(self._ranks.device),
            "memory": "allocated" if self._ranks.device.type == "cuda" else "resident",
            "all": finished.pop("all"),
            "safety_path": finished.pop("safety path"),
            "parts": finished,
        }


class NoProfiler:
    """Records nothing and writes nothing."""

    def step(self, step: int) -> AbstractContextManager[None]:
        """A block that is not recorded."""
        return nullcontext()

    def finish(self) -> None:
        """Does nothing."""


def _numbers(recorder: Recorder, device: torch.device) -> torch.Tensor:
    """[len(REGIONS) * _WIDTH] int64: FLOPs, nanoseconds, peak bytes; bytes and calls by kind."""
    costs = recorder.totals()
    numbers: list[int] = []
    for name in REGIONS:
        cost = costs.get(name, PartCost())
        numbers += [cost.flops, round(cost.seconds * _NANOSECONDS), cost.peak_memory_bytes]
        numbers += [cost.bytes[kind] for kind in KINDS]
        numbers += [cost.calls[kind] for kind in KINDS]
    return torch.tensor(numbers, dtype=torch.int64).to(device)


def _row(name: str, ranks: Sequence[Sequence[int]]) -> Row:
    """One region's cost over ranks, whose numbers are in the order of `_numbers`."""
    flops, nanoseconds, peaks, *counts = zip(*ranks, strict=True)
    sums = [sum(count) for count in counts]
    return {
        "part": name,
        "is_safety_path": name in SAFETY_PATH,
        "flops": sum(flops),
        "bytes": {k: n for k, n in zip(KINDS, sums[: len(KINDS)], strict=True) if n},
        "calls": {k: n for k, n in zip(KINDS, sums[len(KINDS) :], strict=True) if n},
        "seconds": sum(nanoseconds) / len(ranks) / _NANOSECONDS,
        "seconds_max": max(nanoseconds) / _NANOSECONDS,
        "peak_memory_bytes": max(peaks),
    }


def _sum_of(rows: Sequence[Row]) -> Row:
    """The sum of the rows' costs; `peak_memory_bytes` is their maximum."""
    return {
        "flops": sum(row["flops"] for row in rows),
        "bytes": _by_kind(rows, "bytes"),
        "calls": _by_kind(rows, "calls"),
        "seconds": sum(row["seconds"] for row in rows),
        "seconds_max": sum(row["seconds_max"] for row in rows),
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows), default=0),
    }


def _by_kind(rows: Sequence[Row], key: str) -> dict[str, int]:
    sums = {kind: sum(row[key].get(kind, 0) for row in rows) for kind in KINDS}
    return {kind: count for kind, count in sums.items() if count}


def _shares(cost: Row, total: Row) -> Row:
    """Shares of the run's FLOPs, bytes and seconds, each in [0, 1]."""

    def share(own: float, whole: float) -> float:
        return own / whole if whole else 0.0

    return {
        "flops_share": share(cost["flops"], total["flops"]),
        "bytes_share": share(sum(cost["bytes"].values()), sum(total["bytes"].values())),
        "seconds_share": share(cost["seconds"], total["seconds"]),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _read_rows(path: Path) -> list[Row]:
    """Rows of `profile.jsonl`; skips a last line that is incomplete."""
    rows = []
    for line in path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else ():
        if line.endswith("\n"):
            rows.append(parse_json(line))
    return rows


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
