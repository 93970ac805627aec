"""Two folders of results: the same bytes, or floats within a tolerance where one is allowed."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def differences(one: Path, other: Path, rtol: float | None) -> list[str]:
    """What differs between the results of one case in two folders; empty where nothing does.

    With `rtol` floats of JSON rows may differ by that share of the largest value of their field,
    and entries of tensors by that share of their tensor's largest; all else is exact.
    """
    names = [sorted(p.name for p in folder.glob("*.jsonl")) for folder in (one, other)]
    if names[0] != names[1]:
        return [f"files {names[0]} and {names[1]}"]
    if not names[0]:
        return ["no results"]
    found = []
    for name in names[0]:
        a, b = (folder / name for folder in (one, other))
        if a.read_bytes() == b.read_bytes():
            continue
        if rtol is not None and (one / a.stem).is_dir():
            found += _differing_tensors(one / a.stem, other / a.stem, rtol)
        else:
            found += _differing_rows(a, b, rtol)
    return found


def _differing_rows(a: Path, b: Path, rtol: float | None) -> list[str]:
    rows, others = (
        [json.loads(line) for line in p.read_text(encoding="utf-8").splitlines()] for p in (a, b)
    )
    if len(rows) != len(others):
        return [f"{a.name}: {len(rows)} and {len(others)} rows"]
    largest: dict[str, float] = {}
    for row in [*rows, *others]:
        for key, value in _leaves(row):
            if isinstance(value, float):
                largest[key] = max(largest.get(key, 0.0), abs(value))
    for number, (row, other) in enumerate(zip(rows, others, strict=True), start=1):
        x, y = dict(_leaves(row)), dict(_leaves(other))
        if x.keys() != y.keys():
            return [f"{a.name}:{number}: fields {sorted(x.keys() ^ y.keys())} in one only"]
        for key in x:
            if not _is_near(x[key], y[key], (rtol or 0.0) * largest.get(key, 0.0)):
                return [f"{a.name}:{number}: {key} is {x[key]!r} and {y[key]!r}"]
    return []


def _is_near(x: Any, y: Any, allowed: float) -> bool:
    if isinstance(x, float) and isinstance(y, float):
        return x == y or abs(x - y) <= allowed
    return type(x) is type(y) and x == y


def _leaves(value: Any, place: str = "") -> list[tuple[str, Any]]:
    """(path, value) of everything that holds nothing more."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{place}.{k}".lstrip("."))]
    if isinstance(value, list):
        return [leaf for i, v in enumerate(value) for leaf in _leaves(v, f"{place}[{i}]")]
    return [(place, value)]


def _differing_tensors(one: Path, other: Path, rtol: float) -> list[str]:
    tensors, others = (
        {k: t for path in sorted(f.glob("*.safetensors")) for k, t in load_file(path).items()}
        for f in (one, other)
    )
    if tensors.keys() != others.keys():
        return [f"{one.name}: tensors {sorted(tensors.keys() ^ others.keys())} in one only"]
    for name, a in tensors.items():
        b = others[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return [f"{one.name}: {name} is {a.dtype} {a.shape} and {b.dtype} {b.shape}"]
        apart = (a.double() - b.double()).abs().max().item() / max(
            a.double().abs().max().item(), 1e-30
        )
        if not apart <= rtol:
            return [f"{one.name}: {name} is off by {apart:.2e} of its largest entry"]
    return []
