"""The profile of a run as text."""

from typing import Any

_HEAD = ("part", "FLOPs/step", "share", "bytes/rank+mb", "share", "s/step", "share", "peak")
_UNITS = ("", "k", "M", "G", "T", "P", "E")


def profile_table(profile: dict[str, Any]) -> str:
    """The regions of `profile.json`, then the safety path (its regions have a `*`) and the total.

    FLOPs are summed over ranks, bytes are means over ranks and micro-batches, seconds over ranks.
    """
    safety = profile["safety_path"]
    lines = [_HEAD]
    lines += [_cells(name, cost, profile["steps"]) for name, cost in profile["parts"].items()]
    lines += [_cells("* safety path", safety, profile["steps"])]
    lines += [_cells("all", profile["all"], profile["steps"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    text.insert(-2, text[1])
    count = f"{profile['steps']} steps, {profile['world_size']} ranks, {profile['device']}"
    return "\n".join([f"profile of {count} (peak: {profile['memory']} memory)", *text])


def _cells(name: str, cost: dict[str, Any], steps: int) -> tuple[str, ...]:
    steps = max(steps, 1)
    return (
        f"* {name}" if cost.get("is_safety_path") else name,
        with_unit(cost["flops"] / steps),
        f"{cost['flops_share']:.2%}",
        with_unit(cost["bytes_per_rank_and_micro_batch"]),
        f"{cost['bytes_share']:.2%}",
        f"{cost['seconds'] / steps:.4f}",
        f"{cost['seconds_share']:.2%}",
        with_unit(cost["peak_memory_bytes"]),
    )


def with_unit(value: float) -> str:
    """Three digits and a decimal unit (k, M, G, ...)."""
    unit = 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g}{_UNITS[unit]}"
