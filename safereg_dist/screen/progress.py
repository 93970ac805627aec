"""Progress on stderr, in bars and lines: none where nobody watches, and none under `--quiet`."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

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

    It is silent under `quiet`, where stderr is no terminal (a bar fills a job's log with half
    lines), or unless `shown`: one rank shows what all do. `how` is tqdm's own.
    """
    return tqdm(steps, disable=not shows_bars(shown), **how)


class StepProgress:
    """Progress of a long loop: a bar in a terminal, elsewhere a line every `_LINE_EVERY_S`."""

    def __init__(self, name: str, *, total: int, done: int, shown: bool) -> None:
        self._name, self._total, self._shown = name, total, shown
        self._first, self._done = done, done
        self._began = self._said = time.monotonic()
        self._bar = progress_bar(
            total=total, initial=done, desc=name, unit=" steps", shown=shown, dynamic_ncols=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, status: Mapping[str, str]) -> None:
        """One step more, with what is to be shown of it."""
        self._done += 1
        self._bar.set_postfix(status, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._shown and self._bar.disable and now - self._said >= _LINE_EVERY_S:
            self._said = now
            a_step = (now - self._began) / (self._done - self._first)
            left = timedelta(seconds=round(a_step * (self._total - self._done)))
            told = ", ".join(f"{key}={value}" for key, value in status.items())
            say(f"{self._name}: {self._done}/{self._total} steps, {left} left, {told}")


_LINE_EVERY_S = 60.0


def say(text: str) -> None:
    """One line on stderr of what goes on, by the launcher's first rank; none under `quiet`."""
    if not _is_quiet and os.environ.get("RANK", "0") == "0":
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
