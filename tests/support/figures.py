"""What lies on what in a figure, from what matplotlib has drawn."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

GAP = 2.0  # pixels between neighbours in a line: closer ones read as one word


def touches(figure: Figure) -> list[str]:
    """Texts of the figure that lie on another text, or, inside axes, on a line or a marker.

    From points a pixel apart on all lines and around all markers. Grid lines and bars may lie under
    a text.
    """
    figure.draw_without_rendering()
    found = []
    inside, others = [], [(text, _box(text)) for text in figure.texts]
    suptitles = [text for text, _ in others]
    for axes in figure.axes:
        names = [(text, _box(text)) for text in [*axes.texts, *_legend(axes)]]
        drawn = [*_drawn(axes)]
        found += [
            f"{text.get_text()!r} on a line"
            for text, box in names
            if any(_is_inside(box, points).any() for points in drawn)
        ]
        inside += names
        others += [(text, _box(text)) for text in _around(axes) if text not in suptitles]
    others += [(t, _box(t)) for legend in figure.legends for t in legend.get_texts()]
    for (one, a), (other, b) in itertools.combinations([*inside, *others], 2):
        if a.x0 - GAP < b.x1 and b.x0 < a.x1 + GAP and a.y0 < b.y1 and b.y0 < a.y1:
            found.append(f"{one.get_text()!r} on {other.get_text()!r}")
    page = figure.bbox
    for text, box in [*inside, *others]:
        if box.x0 < 0 or box.x1 > page.x1 or box.y0 < 0 or box.y1 > page.y1:
            found.append(f"{text.get_text()!r} cut")
    return found


def _box(text: Text) -> Any:
    return text.get_window_extent()


def _legend(axes: Axes) -> list[Text]:
    legend = axes.get_legend()
    texts = [] if legend is None else [legend.get_title(), *legend.get_texts()]
    return [text for text in texts if text.get_text()]


def _around(axes: Axes) -> list[Text]:
    """Title, labels and the numbers of the axes, those that are shown."""
    found = [axes.title, axes.xaxis.label, axes.yaxis.label]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for ticks in (axis.get_major_ticks(), axis.get_minor_ticks()):
            found += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text()]


def _drawn(axes: Axes) -> Iterator[np.ndarray]:
    """Points, in pixels, on each line and around each marker."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    dots = figure.dpi / 72
    angle = np.linspace(0, 2 * np.pi, 60)
    around = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for line in axes.lines:
        points = line.get_transform().transform(np.asarray(line.get_xydata(), dtype=float))
        points = points[np.isfinite(points).all(axis=1)]
        if line.get_linestyle() not in ("None", "", " "):
            yield from _along(points)
        if line.get_marker() not in ("None", "", " ", None):
            yield from (p + line.get_markersize() / 2 * dots * around for p in points)
    for lines in axes.collections:
        if isinstance(lines, LineCollection):
            for segment in lines.get_segments():
                yield from _along(lines.get_transform().transform(segment))


def _along(points: np.ndarray) -> Iterator[np.ndarray]:
    for a, b in itertools.pairwise(points):
        share = np.linspace(0, 1, int(np.hypot(*(b - a))) + 2)[:, None]
        yield a + share * (b - a)


def _is_inside(box: Any, points: np.ndarray) -> np.ndarray:
    return (
        (points[:, 0] > box.x0)
        & (points[:, 0] < box.x1)
        & (points[:, 1] > box.y0)
        & (points[:, 1] < box.y1)
    )
