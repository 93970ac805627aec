"""The terminal of a command may go away; what it runs goes on."""

import io
import os
import signal
import sys
from typing import Any, TextIO


def outlive_terminal() -> None:
    """Makes this process deaf to a closed terminal, and its output to who no longer reads it.

    SIGHUP is ignored where nothing handles it. What is written to `sys.stdout` or `sys.stderr`
    after their reader has gone, or while the disk behind them is full, is dropped.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


class _Dropping(io.FileIO):
    """A descriptor to which writing never fails."""

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _lasting(stream: TextIO | None) -> TextIO:
    """The same stream over a descriptor that cannot fail; nothing is written where it is closed."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # what a program has put there itself
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Dropping(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
