"""The claims that `bench_overhead.py` checks on its rows: one line each, and how far it holds."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]

FLOPS_AT_ZERO = 1.005
SAFETY_BYTES_AT_ZERO = 16
FLOPS_AT_TENTH, ALWAYS_ON_AT_TENTH = 1.045, 1.30
STORED_AT_TENTH = 1.005
LARGE_STEP_ROWS, LARGE_STEP_FRACTION, BYTES_AT_LARGE_STEP = 512, 0.01, 1.05
LOSS_TOLERANCE = 1e-5
"""Relative, float32: the arms sum in different orders."""
OURS = ("routed", "routed_first_epoch", "stored")
WITHOUT_FIRST_EPOCH = ("routed", "stored")


class Claim(NamedTuple):
    """What must hold."""

    text: str
    holds: bool | None
    """None where nothing was measured that could tell."""
    measured: str


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """All claims; `rows` have numbers or None under the names of the CSV's columns."""
    ours_at_zero = _pick(rows, WITHOUT_FIRST_EPOCH, fraction=0.0)
    routed, peer = (_pick(rows, [arm]) for arm in ("routed", "always_on"))
    at_tenth, at_one = (_at(routed, fraction) for fraction in (0.1, 1.0))
    stored_meta = [r for r in _pick(rows, ["stored"], fraction=0.1) if r["device"] == "meta"]
    large = [r for r in _at(routed, LARGE_STEP_FRACTION) if r["rows_per_step"] == LARGE_STEP_ROWS]
    return [
        _at_most("0 % risky: FLOPs", ours_at_zero, "flops_ratio_to_sft", FLOPS_AT_ZERO),
        _at_most(
            "0 % risky: bytes of the safety path per rank and micro-batch",
            ours_at_zero,
            "safety_bytes_per_micro_batch",
            SAFETY_BYTES_AT_ZERO,
        ),
        _time_claim(rows, ours_at_zero),
        _at_most("10 % risky: FLOPs routed", at_tenth, "flops_ratio_to_sft", FLOPS_AT_TENTH),
        _at_least(
            "10 % risky: FLOPs always on",
            _at(peer, 0.1),
            "flops_ratio_to_sft",
            ALWAYS_ON_AT_TENTH,
        ),
        _peer_claim("100 % risky: FLOPs routed / always on", at_one, peer, "flops"),
        _peer_claim(
            "100 % risky: peak memory routed / always on", at_one, peer, "peak_memory_bytes"
        ),
        _at_most(
            "10 % risky, stored, real shapes: FLOPs",
            stored_meta,
            "flops_ratio_to_sft",
            STORED_AT_TENTH,
        ),
        _at_most(
            f"1 % risky, {LARGE_STEP_ROWS} rows a step: bytes",
            large,
            "bytes_ratio_to_sft",
            BYTES_AT_LARGE_STEP,
        ),
        _loss_claim(_pick(rows, OURS), peer),
    ]


def notes_of(rows: Sequence[Row]) -> list[str]:
    """What nothing is claimed about, and one may want to know."""
    routed = _at(_pick(rows, ["routed"]), 1.0)
    peer = _pick(rows, ["always_on"])
    others = [
        _peer_claim("100 % risky: bytes routed / always on", routed, peer, "total_bytes"),
        _peer_claim("100 % risky: time routed / always on", routed, peer, "time_ratio_to_sft"),
    ]
    noise = [noise_of(row) for row in _pick(rows, ["sft"]) if row["time_ratio_q20"] is not None]
    found = [f"{note.text.removesuffix(', at most 1')}: up to {note.measured}" for note in others]
    if noise:
        found.append(f"noise of a time ratio in one round: {min(noise):.1%} to {max(noise):.1%}")
    return found


def _pick(rows: Iterable[Row], arms: Sequence[str], fraction: float | None = None) -> list[Row]:
    chosen = [row for row in rows if row["arm"] in arms]
    return chosen if fraction is None else _at(chosen, fraction)


def _at(rows: Iterable[Row], fraction: float) -> list[Row]:
    return [row for row in rows if row["risky_fraction"] == fraction]


def _case(row: Row) -> tuple[Any, ...]:
    """What rows of one case have in common."""
    names = ("device", "ranks", "model", "rows_per_step", "risky_fraction")
    return tuple(row[name] for name in names)


def _where(row: Row) -> str:
    source = f" ({row['risk_source']})" if row["arm"] == "routed" else ""
    return f"{row['arm']}{source}, {row['model']}, {row['device']}, {row['ranks']} ranks"


def _at_most(text: str, rows: Iterable[Row], column: str, limit: float) -> Claim:
    return _bounded(text, rows, column, f"at most {limit:g}", max, lambda value: value <= limit)


def _at_least(text: str, rows: Iterable[Row], column: str, limit: float) -> Claim:
    return _bounded(text, rows, column, f"at least {limit:g}", min, lambda value: value >= limit)


def _bounded(
    text: str,
    rows: Iterable[Row],
    column: str,
    bound: str,
    worst_of: Callable[..., Row],
    is_good: Callable[[float], bool],
) -> Claim:
    known = [row for row in rows if row[column] is not None]
    if not known:
        return Claim(f"{text}, {bound}", None, "not measured")
    worst = worst_of(known, key=lambda row: row[column])
    return Claim(
        f"{text}, {bound}", is_good(worst[column]), f"{worst[column]:.5g} ({_where(worst)})"
    )


def noise_of(row: Row) -> float:
    """How far plain fine-tuning is off from itself in one round, from the row of `sft`."""
    return max(abs(row["time_ratio_q20"] - 1), abs(row["time_ratio_q80"] - 1))


def _time_claim(rows: Iterable[Row], ours: Iterable[Row]) -> Claim:
    """No slower than plain fine-tuning by more than that is off from itself in the same rounds."""
    noise = {
        _case(row): noise_of(row)
        for row in _pick(rows, ["sft"])
        if row["time_ratio_q20"] is not None
    }
    excess = [
        (row["time_ratio_to_sft"] - 1 - noise[_case(row)], row)
        for row in ours
        if row["time_ratio_to_sft"] is not None
    ]
    text = "0 % risky: time within the noise of plain fine-tuning against itself"
    if not excess:
        return Claim(text, None, "not measured")
    worst, row = max(excess, key=lambda pair: pair[0])
    return Claim(
        text,
        worst <= 0,
        f"{row['time_ratio_to_sft']:.3f} with noise {noise[_case(row)]:.3f} ({_where(row)})",
    )


def _peer_claim(text: str, ours: Iterable[Row], peer: Iterable[Row], column: str) -> Claim:
    """Not more than the peer of the same case."""
    by_case = {_case(row): row[column] for row in peer}
    ratios = [
        (row[column] / by_case[_case(row)], row)
        for row in ours
        if row[column] is not None and by_case.get(_case(row)) is not None
    ]
    if not ratios:
        return Claim(f"{text}, at most 1", None, "not measured")
    worst, row = max(ratios, key=lambda pair: pair[0])
    return Claim(f"{text}, at most 1", worst <= 1, f"{worst:.4g} ({_where(row)})")


def _loss_claim(ours: Iterable[Row], peer: Iterable[Row]) -> Claim:
    """The same loss as the peer of the same case."""
    by_case = {_case(row): row["loss"] for row in peer if row["loss"] is not None}
    errors = [
        (abs(row["loss"] / by_case[_case(row)] - 1), row)
        for row in ours
        if row["loss"] is not None and _case(row) in by_case
    ]
    text = f"loss equal to the always-on one within {LOSS_TOLERANCE:g}"
    if not errors:
        return Claim(text, None, "not measured")
    worst, row = max(errors, key=lambda pair: pair[0])
    return Claim(
        text,
        worst <= LOSS_TOLERANCE,
        f"{worst:.2g} in {len(errors)} comparisons, at {row['risky_fraction']:.0%}: {_where(row)}",
    )
