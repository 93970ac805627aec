"""The profile of a run as a figure: each region's share of FLOPs, bytes and seconds."""

import io
from typing import Any

_PLAIN, _SAFETY = "#0072B2", "#E07B00"  # as in every figure here: ours is orange
_SCALES = (("flops_share", "FLOPs"), ("bytes_share", "bytes"), ("seconds_share", "seconds"))


def shares_png(profile: dict[str, Any]) -> bytes:
    """A PNG of three bar charts over the regions of `profile.json`, the safety path in orange."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs = profile["parts"]
    names = list(costs)
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(names)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(_SCALES), sharey=True)
    colours = [_SAFETY if costs[name]["is_safety_path"] else _PLAIN for name in names]
    for axes, (key, label) in zip(panels, _SCALES, strict=True):
        shares = [100 * costs[name][key] for name in names]
        bars = axes.barh(names, shares, color=colours, height=0.7)
        axes.bar_label(bars, labels=[_percent(share) for share in shares], padding=3, fontsize=8)
        axes.set_xlabel(f"% of {label}")
        axes.set_xlim(0, 1.3 * max(shares, default=0) or 1)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    safety = profile["safety_path"]
    figure.suptitle(
        f"The safety path (orange) takes {_percent(100 * safety['flops_share'])} of the FLOPs, "
        f"{_percent(100 * safety['bytes_share'])} of the bytes, "
        f"{_percent(100 * safety['seconds_share'])} of the time",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _percent(share: float) -> str:
    return "0 %" if share == 0 else f"{share:.2g} %" if share < 99.5 else f"{share:.0f} %"
