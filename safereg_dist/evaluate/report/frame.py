"""What all figures of a report share: colours for light and dark pages, sizes, titles, legends.

Colours are fixed and safe for colour-blind readers: blue for what is compared against, grey for the
reference, orange for runs whose coefficient follows the risk. A figure is as wide as it is shown on
a phone; on a wide page two stand side by side.
"""

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from safereg_dist.evaluate.report.arms import Arm


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours on a light or a dark page."""

    ground: str
    ink: str
    soft: str
    """Of axes and notes; it can be read on the ground."""
    grid: str
    shades: dict[str, tuple[str, ...]]
    """By role; each stands out from the ground by 3 : 1 or more."""


LIGHT = Theme(
    ground="#FFFFFF",
    ink="#222222",
    soft="#555555",
    grid="#E6E6E6",
    shades={
        "baseline": ("#0072B2", "#3A8FC0", "#004266", "#6A86B5"),
        "reference": ("#6B6B6B", "#8C8C8C"),
        "ours": ("#C96A00", "#8A4600", "#B9770E"),
    },
)
DARK = Theme(
    ground="#16181D",
    ink="#E8E8E8",
    soft="#B4B8BF",
    grid="#33373F",
    shades={
        "baseline": ("#56B4E9", "#9AD0F5", "#3F97CF", "#B9C9E8"),
        "reference": ("#A8A8A8", "#D0D0D0"),
        "ours": ("#F5A13D", "#FFC98A", "#DD8A24"),
    },
)

_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
WIDTH = 4.2  # inches: at a phone's 360 px ten-point text is eleven pixels high
_DPI = 200
_TITLE_LETTERS = 42  # of bold text at this width
_NAME_LENGTH = 24
_LEGEND_LINE = 0.19  # inches


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A figure that is being drawn."""

    key: str
    """Part of the file name."""
    figure: Figure
    title: str
    """The message."""
    caption: str
    """How to read it."""
    legend: list[Artist]
    """What stands below the axes; it grows where `finish` finds no place for a label."""
    finish: Callable[[], list[Artist]] = list
    """Draws what needs the final layout; what it has no place for, for the legend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A finished figure."""

    key: str
    title: str
    caption: str
    png: bytes
    svg: bytes
    dark_svg: bytes


Maker = Callable[[list[Arm], Theme], Plot | None]


def rc_of(theme: Theme) -> dict[str, Any]:
    """Settings of matplotlib for a theme."""
    edges = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.soft)
    grounds = dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.ground)
    return {
        **matplotlib.rcParamsDefault,
        **edges,
        **grounds,
        "savefig.facecolor": theme.ground,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "grid.color": theme.grid,
        "font.size": 10,
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
        "text.parse_math": False,  # a "$" in the name of a run is a dollar sign
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "svg.hashsalt": "safereg",  # same data, same bytes
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How an arm is drawn."""

    colour: str
    dash: str
    marker: str


def styles_of(arms: list[Arm], theme: Theme) -> dict[str, Style]:
    """The style of each arm by name; arms of one role differ in shade, dash and marker."""
    seen: dict[str, int] = {}
    styles = {}
    for position, arm in enumerate(arms):
        index = seen.get(arm.role, 0)
        seen[arm.role] = index + 1
        shades = theme.shades[arm.role]
        styles[arm.name] = Style(
            colour=shades[index % len(shades)],
            dash=_DASHES[index % len(_DASHES)],
            marker=_MARKERS[position % len(_MARKERS)],
        )
    return styles


def new_figure(height: float) -> Figure:
    """An empty figure, `height` inches without title and legend."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def short(name: str) -> str:
    """A name that fits into a figure."""
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 3] + "..."


def stacked(name: str) -> str:
    """A name for the side of a figure: a long one in two lines, broken at the middle `_`."""
    name, middle = short(name), len(name) / 2
    breaks = [place + 1 for place, letter in enumerate(name) if letter == "_"]
    if len(name) <= 15 or not breaks:
        return name
    at = min(breaks, key=lambda place: abs(place - middle))
    return f"{name[:at]}\n{name[at:]}"


def row_height(names: list[str]) -> float:
    """Inches of a row that is named at the side of a figure."""
    return 0.36 if any("\n" in stacked(name) for name in names) else 0.27


def key_of(arm: Arm, style: Style, *, line: bool) -> Line2D:
    """An arm's entry of a legend: as a line, or as a point."""
    mark: dict[str, Any] = {"ls": style.dash} if line else {"ls": "", "marker": style.marker}
    return Line2D([], [], color=style.colour, label=short(arm.name), **mark)


def lay_out(plot: Plot) -> Figure:
    """Gives the figure its title and legend, settles its layout, and calls `finish`."""
    figure, legend = plot.figure, list(plot.legend)
    body = figure.get_figheight()
    while True:
        _settle(plot, body, legend)
        homeless = plot.finish()
        if not homeless:
            figure.set_layout_engine("none")  # it is settled: each saving would do it again
            return figure
        legend += homeless


def _settle(plot: Plot, body: float, legend: list[Artist]) -> None:
    figure = plot.figure
    for text in [*figure.texts, *figure.legends]:
        text.remove()
    lines = textwrap.wrap(plot.title, _TITLE_LETTERS)
    names = [str(entry.get_label()) for entry in legend]
    columns = 2 if max(map(len, names), default=0) <= 17 else 1
    room = 0.19 * len(lines) + 0.12  # inches above the axes
    below = -(-len(names) // columns) * _LEGEND_LINE
    height = body + room + below
    figure.set_figheight(height)
    # Placed by hand, since constrained layout would centre it over the axes.
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    layout.set(rect=(0.0, 0.0, 1.0, 1.0 - room / height))
    bold = {"fontsize": 11, "fontweight": "bold", "va": "top"}
    figure.text(0.015, 1.0 - 0.05 / height, "\n".join(lines), **bold)
    if legend:
        how: Any = {"frameon": False, "fontsize": 9.5, "handlelength": 2.2, "borderpad": 0.1}
        figure.legend(handles=legend, loc="outside lower left", ncols=columns, **how)
    figure.draw_without_rendering()


def draw(maker: Maker, arms: list[Arm]) -> Drawing | None:
    """The figure for light and for dark pages; None where `arms` have no data for it."""
    png, pages = io.BytesIO(), []
    for theme in (LIGHT, DARK):
        # Not pyplot: its global state belongs to the caller.
        with matplotlib.rc_context(cast(Any, rc_of(theme))):
            plot = maker(arms, theme)
            if plot is None:
                return None
            figure, svg = lay_out(plot), io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            if theme is LIGHT:
                figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
            pages.append((plot, svg.getvalue()))
    (plot, svg), (_, dark) = pages
    words = {"key": plot.key, "title": plot.title, "caption": plot.caption}
    return Drawing(**words, png=png.getvalue(), svg=svg, dark_svg=dark)
