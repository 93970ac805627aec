"""Progress on stderr: bars in a terminal, else lines, and nothing under `--quiet`."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_is_quiet = False


@contextmanager
def quiet(is_quiet: bool = True) -> Iterator[None]:
    """A block in which no bar is shown, if `is_quiet`."""
    global _is_quiet
    before, _is_quiet = _is_quiet, _is_quiet or is_quiet
    try:
        yield
    finally:
        _is_quiet = before


def progress_bar(steps: Iterable[Any] | None = None, *, shown: bool = True, **how: Any) -> tqdm:
    """A progress bar over `steps`, or over `total` that `update` counts.

    Where stderr is no terminal (a bar fills a job's log with half lines) a line every half minute
    in its place. It is silent under `quiet`, or unless `shown`: one rank shows what all do. `how`
    is tqdm's own.
    """
    if shown and not _is_quiet and not sys.stderr.isatty():
        return _Lines(steps, **how)
    return tqdm(steps, disable=not shows_bars(shown), **how)


class _Lines(tqdm):
    """A line of its own for each look, none at the beginning and none at the end."""

    def __init__(self, steps: Iterable[Any] | None, **how: Any) -> None:
        own = {"mininterval": _LINE_EVERY_S, "delay": _LINE_EVERY_S, "miniters": 1}
        own["bar_format"] = "{desc}: {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        super().__init__(steps, **{**how, **own})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Says how far it is."""
        say(msg or str(self))
        return True

    def close(self) -> None:
        """Ends it; what is to be said of the end is said by the verb."""
        self.sp = None  # tqdm's printer: without one it writes nothing
        super().close()


_LINE_EVERY_S = 30.0


def say(text: str) -> None:
    """One line on stderr of what goes on, by the launcher's first rank; none under `quiet`."""
    if not _is_quiet and os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()  # in a log both go to one file, in the order in which they were said
        print(text, file=sys.stderr, flush=True)


def shows_bars(shown: bool) -> bool:
    """True if `progress_bar(shown=shown)` is to be seen."""
    return shown and not _is_quiet and sys.stderr.isatty()


@contextmanager
def bars_of_transformers(*, shown: bool) -> Iterator[None]:
    """A block in which transformers draws its bars, of weights that it loads, where we would."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    if not shows_bars(shown):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
