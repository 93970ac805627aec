"""A file of each rank in the run folder: what went wrong on a host that nobody was looking at.

    RUN/logs/rank0003.HOST.log      time, host, rank, level, who says it, and the text

It holds the start and the end of each start of the run, warnings of Python and of every library,
the traceback of whatever ended the rank, and all stacks where it crashed (`faulthandler`). At most
twice `MAX_BYTES` are kept. Values of environment variables that are named as secrets never get in.
"""

import faulthandler
import logging
import os
import re
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20
_KEPT = 200  # records from before the folder belongs to a run
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
_SHORTEST_SECRET = 6  # a shorter value is a flag or a number, and stands in other words too


@contextmanager
def rank_log(folder: Path, *, rank: int, world_size: int) -> Iterator[Callable[[str], None]]:
    """A block whose warnings and uncaught error also go to this rank's file below `folder`.

    Yields a function that writes a line. The file appears once the folder holds a run; what comes
    before is kept for it. A file that cannot be written is no error.
    """
    log = _RankFile(folder, rank)
    show, make = warnings.showwarning, logging.getLogRecordFactory()

    def show_and_keep(message: Any, category: type[Warning], *where: Any) -> None:
        show(message, category, *where)
        log.say(logging.WARNING, f"{where[0]}:{where[1]}: {category.__name__}: {message}")

    def make_and_keep(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.levelno >= logging.WARNING:
            log.handle(record)
        return record

    warnings.showwarning = show_and_keep
    # A handler of the root logger would miss loggers that do not propagate (deepspeed's, the
    # Hub's), and would silence the handler of last resort.
    logging.setLogRecordFactory(make_and_keep)
    log.say(logging.INFO, f"start: rank {rank} of {world_size}, process {os.getpid()}")
    try:
        yield partial(log.say, logging.INFO)
    except KeyboardInterrupt:
        log.say(logging.INFO, "interrupted from the keyboard")
        raise
    except BaseException:
        log.say(logging.ERROR, "ended by an error", exc_info=True)
        raise
    finally:
        warnings.showwarning = show
        logging.setLogRecordFactory(make)
        log.close()


class _RankFile(RotatingFileHandler):
    """Writes records once the folder holds a run; crashes go to the same file."""

    def __init__(self, folder: Path, rank: int) -> None:
        host = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())
        path = folder / "logs" / f"rank{rank:04d}.{host}.log"
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8", delay=True)
        self.setFormatter(_Formatter(host, rank))
        self._claimed = folder / "config.yaml"
        self._waiting: deque[logging.LogRecord] = deque(maxlen=_KEPT)
        self._path = path
        self._takes_crashes = not faulthandler.is_enabled()  # else they are wanted elsewhere

    def say(self, level: int, text: str, *, exc_info: bool = False) -> None:
        """Writes a line of our own."""
        error = sys.exc_info() if exc_info else None
        self.handle(logging.LogRecord("safereg_dist", level, "", 0, text, None, error))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record, after those that have waited for the folder."""
        self._waiting.append(record)
        if not self._claimed.is_file():
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
        except OSError:
            return
        while self._waiting:
            super().emit(self._waiting.popleft())

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        if self._takes_crashes:
            faulthandler.enable(stream)
        return stream

    def close(self) -> None:
        """Closes the file; a crash after that is not its business."""
        if self._takes_crashes and self.stream is not None:
            faulthandler.disable()
        with suppress(OSError):  # the disk may still be full
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Nothing: training goes on where the log cannot be written."""


class _Formatter(logging.Formatter):
    converter = time.gmtime

    def __init__(self, host: str, rank: int) -> None:
        line = f"%(asctime)s.%(msecs)03dZ {host} rank{rank} %(levelname)s %(name)s: %(message)s"
        super().__init__(line, "%Y-%m-%dT%H:%M:%S")
        self._secrets = secrets_of_environment()

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record), self._secrets)


def secrets_of_environment() -> list[str]:
    """The values of environment variables that are named as secrets, the longest first."""
    named = (value for name, value in os.environ.items() if _SECRET.search(name))
    return sorted((v for v in named if len(v) >= _SHORTEST_SECRET), key=len, reverse=True)


def masked(text: str, secrets: Iterable[str]) -> str:
    """The text with stars in the place of secrets."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
