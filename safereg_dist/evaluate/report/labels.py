"""Names beside points, placed so that no name lies on another, on a point or on a line."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

_DISTANCES = (6.0, 10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 76.0)  # points, from a marker's edge
_LEADER = 9.0  # points: from there on, or beside another point, a thin line says whose name it is
_DIRECTIONS = 24
_PAD = 1.6  # points around a name
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels
Segment = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A point that is to be named."""

    name: str
    x: float
    y: float
    radius: float
    """Of its marker, in points."""
    bold: bool = False


def place_labels(
    axes: Axes, spots: Sequence[Spot], lines: Sequence[Segment], *, soft: str
) -> set[str]:
    """Writes each name at the nearest free place; returns the names that have none.

    Args:
        spots: the points, in data coordinates; the first ones choose first, those without a
            name are only kept clear of.
        lines: drawn segments that no name may touch, in data coordinates.
        soft: colour of the thin lines from points to names that stand off.
    """
    for artist in [*axes.texts, *(line for line in axes.lines if line.get_gid() == "leader")]:
        artist.remove()
    point = _point(axes)
    discs = [_disc(axes, spot, point) for spot in spots]
    drawn = [_in_pixels(axes, line) for line in lines]
    leaders: list[Segment] = []
    names: list[Box] = []
    homeless = set()
    for place, spot in enumerate(spots):
        if not spot.name:
            continue
        text = _text(axes, spot)
        extent = text.get_window_extent()
        size = extent.width + 2 * _PAD * point, extent.height + 2 * _PAD * point
        found = _free(axes, place, size, names, discs, drawn, leaders)
        if found is None:
            text.remove()
            homeless.add(spot.name)
            continue
        box, leader = found
        names.append(box)
        text.set_position(_in_data(axes, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        if leader is not None:
            leaders.append(leader)
            (x0, y0), (x1, y1) = _in_data(axes, *leader[:2]), _in_data(axes, *leader[2:])
            (line,) = axes.plot([x0, x1], [y0, y1], color=soft, linewidth=0.6, zorder=1)
            line.set_gid("leader")
    return homeless


def _point(axes: Axes) -> float:
    """Pixels of a point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure.dpi / 72.0


def _text(axes: Axes, spot: Spot) -> Text:
    weight = "bold" if spot.bold else "normal"
    text = axes.text(spot.x, spot.y, spot.name, ha="center", va="center", zorder=7)
    text.set(fontsize=9, fontweight=weight, in_layout=False)
    rim = withStroke(linewidth=2.5, foreground=axes.get_facecolor())  # grid lines end around it
    text.set_path_effects([rim])
    assert isinstance(axes.figure.canvas, FigureCanvasAgg)
    return text


def _free(
    axes: Axes,
    place: int,
    size: tuple[float, float],
    names: list[Box],
    discs: list[Box],
    lines: list[Segment],
    leaders: list[Segment],
) -> tuple[Box, Segment | None] | None:
    """The free box of that size nearest to a point, and the line to it where it stands off."""
    disc, others = discs[place], discs[:place] + discs[place + 1 :]
    apart = [other for other in others if not _overlap(disc, other)]
    point = _point(axes)
    middle = (disc[0] + disc[2]) / 2, (disc[1] + disc[3]) / 2
    radius = (disc[2] - disc[0]) / 2
    room = axes.get_window_extent()
    steps = [2 * math.pi * step / _DIRECTIONS for step in range(_DIRECTIONS)]
    for distance, angle in itertools.product(_DISTANCES, steps):
        across, up = math.cos(angle), math.sin(angle)
        off = radius + distance * point
        x = middle[0] + off * across + size[0] / 2 * _sign(across)
        y = middle[1] + off * up + size[1] / 2 * _sign(up)
        box = (x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)
        if box[0] < room.x0 or box[2] > room.x1 or box[1] < room.y0 or box[3] > room.y1:
            continue
        if any(_overlap(box, other) for other in [*names, *discs]):
            continue
        if any(_crosses(line, box) for line in [*lines, *leaders]):
            continue
        if distance < _LEADER and _is_nearest(disc, box, others, 2 * _PAD * point):
            return box, None
        end = min(max(middle[0], box[0]), box[2]), min(max(middle[1], box[1]), box[3])
        leader = (*middle, *end)
        if not any(_crosses(leader, other) for other in [*names, *apart]):
            return box, leader
    return None


def _is_nearest(disc: Box, box: Box, others: list[Box], clearly: float) -> bool:
    """Whether nobody can take a name for that of another point."""
    return all(_gap(disc, box) + clearly < _gap(other, box) for other in others)


def _sign(value: float) -> float:
    """-1, 0 or 1; 0 also next to it, so that names stand centred over and under points."""
    return 0.0 if abs(value) < 0.3 else math.copysign(1.0, value)


def _disc(axes: Axes, spot: Spot, point: float) -> Box:
    x, y = axes.transData.transform((spot.x, spot.y))
    radius = spot.radius * point
    return float(x - radius), float(y - radius), float(x + radius), float(y + radius)


def _in_pixels(axes: Axes, line: Segment) -> Segment:
    (x0, y0), (x1, y1) = axes.transData.transform([line[:2], line[2:]])
    return float(x0), float(y0), float(x1), float(y1)


def _in_data(axes: Axes, x: float, y: float) -> tuple[float, float]:
    found = axes.transData.inverted().transform((x, y))
    return float(found[0]), float(found[1])


def _gap(disc: Box, box: Box) -> float:
    """Distance of a point's middle to a box."""
    x, y = (disc[0] + disc[2]) / 2, (disc[1] + disc[3]) / 2
    return math.hypot(max(box[0] - x, x - box[2], 0.0), max(box[1] - y, y - box[3], 0.0))


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _crosses(line: Segment, box: Box) -> bool:
    """Whether a segment touches a box (Liang and Barsky's clipping)."""
    x0, y0, x1, y1 = line
    enter, leave = 0.0, 1.0
    for delta, low, high in (
        (x1 - x0, box[0] - x0, box[2] - x0),
        (y1 - y0, box[1] - y0, box[3] - y0),
    ):
        if delta == 0:
            if low > 0 or high < 0:
                return False
            continue
        near, far = sorted((low / delta, high / delta))
        enter, leave = max(enter, near), min(leave, far)
    return enter <= leave
