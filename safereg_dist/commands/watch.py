"""`safereg watch`: follows the run in a folder, from any machine that sees it."""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from safereg_dist.commands.options import example

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

    from safereg_dist.run.watching import MetricsTail, RunView

_BARS = "".join(map(chr, range(0x2581, 0x2589)))  # eighths of a block, from low to full
_PLAIN_BARS = "_.-:=+*#"
_SPARKS = 40
_LISTED = 3
_COLOURS = {
    **{"running": "green", "complete": "green", "stopping": "yellow"},
    **{"failed": "red", "dead": "red"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example("safereg watch runs/my-run --every 5")
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="output_dir of the run; it may not be there yet",
    )
    parser.add_argument(
        "--every", type=_seconds, default=2.0, metavar="SECONDS", help="seconds between two looks"
    )
    parser.add_argument("--once", action="store_true", help="one look")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise ValueError
    return value


def run(arguments: argparse.Namespace) -> int:
    """Shows the run until it has ended for good, or Ctrl-C; 0."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of few characters
    console = Console(highlight=False)
    try:
        _follow(console, arguments.run_dir, every_s=arguments.every, once=arguments.once)
    except KeyboardInterrupt:
        pass
    return 0


def _follow(console: "Console", folder: Path, *, every_s: float, once: bool) -> None:
    from rich.live import Live

    from safereg_dist.run.metrics import METRICS_NAME
    from safereg_dist.run.watching import ENDED, MetricsTail, look_at

    tail = MetricsTail(folder / METRICS_NAME)
    view = look_at(folder, tail)
    if once or not console.is_terminal:
        console.print(frame(folder, view, tail, console), soft_wrap=True)
        while not once and view.state not in ENDED:
            time.sleep(every_s)
            before, view = view, look_at(folder, tail)
            if view != before:
                console.print(frame(folder, view, tail, console), soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        live.update(frame(folder, view, tail, console), refresh=True)
        while view.state not in ENDED:
            time.sleep(every_s)
            view = look_at(folder, tail)
            live.update(frame(folder, view, tail, console), refresh=True)


def frame(folder: Path, view: "RunView", tail: "MetricsTail", console: "Console") -> "Group":
    """One frame: how far the run is, its numbers, and what there is to know."""
    from rich.console import Group
    from rich.text import Text

    from safereg_dist.errors import printable

    state = (view.state, _COLOURS.get(view.state, ""))
    head = Text.assemble((printable(folder), "bold"), "  ", state, f"  {view.note}")
    parts: list[Text | Table] = [head, Text(_progress(view))]
    if tail.last:
        parts += [Text(_status(tail)), _table(tail, console)]
    notes = [_checkpoints(view), *_listed("alerts", view.alerts)]
    notes += _listed("warnings", view.warnings)
    notes += [f"{name} is told no more: {why}" for name, why in view.dropped.items()]
    return Group(*parts, *map(Text, notes))


def _progress(view: "RunView") -> str:
    total = "?" if view.total_steps is None else view.total_steps
    left = ""
    if view.seconds_left is not None:
        left = f", about {timedelta(seconds=round(view.seconds_left))} left"
    return f"step {view.step} of {total}{left}"


def _status(tail: "MetricsTail") -> str:
    from safereg_dist.run.status import status_of

    return "  ".join(f"{name} {value}" for name, value in status_of(tail.last).items())


def _table(tail: "MetricsTail", console: "Console") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("", "last", "mean", "least", "most", "over time"):
        table.add_column(title, justify="left" if title in ("", "over time") else "right")
    is_wide = (console.encoding or "").lower().startswith("utf")
    for name, values in tail.series.items():
        if values:
            numbers = (values[-1], statistics.fmean(values), min(values), max(values))
            shown = (f"{number:.4g}" for number in numbers)
            table.add_row(name, *shown, sparkline(values, _BARS if is_wide else _PLAIN_BARS))
    return table


def _checkpoints(view: "RunView") -> str:
    newest = f", the newest {view.checkpoints[-1]}" if view.checkpoints else ""
    return f"checkpoints: {len(view.checkpoints)}{newest}"


def _listed(what: str, texts: Sequence[str]) -> list[str]:
    return [f"{what}: {len(texts)}", *(f"  {text}" for text in texts[-_LISTED:])] if texts else []


def sparkline(values: Sequence[float], bars: str, width: int = _SPARKS) -> str:
    """The values from least to most as bars, at most `width`: each the mean of its stretch."""
    count = min(width, len(values))
    ends = [len(values) * place // count for place in range(count + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in pairwise(ends)]
    low, span = min(means), max(means) - min(means)
    heights = [(mean - low) / span if span > 0 else 0.0 for mean in means]
    return "".join(bars[round(height * (len(bars) - 1))] for height in heights)
