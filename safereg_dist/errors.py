"""The one family of errors, and the exit statuses of the `safereg` command.

Every message says what was expected, what came, where, and what to do. Under several ranks an error
that only one rank sees is agreed upon first (`parallel.comm.Ranks.raise_together`).
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safereg_kernels.errors import ShapeError

__all__ = [
    "EXIT_CODES",
    "EXIT_DONE",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_REFUSED",
    "EXIT_REQUEUE",
    "CheckpointError",
    "ConfigError",
    "CriticUnavailable",
    "DataError",
    "EndpointError",
    "GroupError",
    "LedgerError",
    "NonFiniteLoss",
    "PeerLost",
    "ProbeError",
    "RemoteRankError",
    "SafeRegError",
    "ShapeError",
    "is_user_error",
    "own_errors",
    "printable",
    "reason_of",
]

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2  # argparse's own for a command line that does not parse
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: schedulers take it for "try again"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_CODES = {
    EXIT_DONE: "done",
    EXIT_FAILED: "failed, though the command was right: a lost rank, a loss that is not finite; or "
    "`doctor` found what would fail, or a cell of a `sweep` failed",
    EXIT_REFUSED: "refused: one line says what was expected, what came and what to do; also a "
    "command line that does not parse",
    EXIT_REQUEUE: "saved a checkpoint and ended on request (`safereg stop`, SIGUSR1, SIGTERM): the "
    "same command goes on",
    EXIT_INTERRUPTED: "interrupted from the keyboard",
}
"""Every status that the command ends with, and what it means."""
LONGEST = 500
"""Characters of an error's line, beyond which its middle is left out."""


def printable(value: object, limit: int = 0) -> str:
    """A value's text in one line that a terminal shows and does not obey.

    Line breaks become spaces; other control characters, marks that turn the direction of writing,
    and halves of surrogate pairs are written as Python escapes them. Of more than `limit`
    characters (0: any number) the middle is left out.
    """
    text = " ".join(str(value).split())
    if 0 < limit < len(text):
        text = f"{text[: limit * 2 // 3]} [...] {text[-limit // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class SafeRegError(Exception):
    """Base of all errors that this package raises on purpose; its text is one line, `printable`."""

    def __str__(self) -> str:
        return printable(super().__str__(), LONGEST)


class ConfigError(SafeRegError):
    """A key, a value or a combination of the configuration, or a model that does not fit it."""


class DataError(SafeRegError):
    """A data file or a row in it."""


class ProbeError(SafeRegError):
    """A probe that is missing, unreadable, or belongs to another model."""


class CriticUnavailable(SafeRegError):  # noqa: N818 - the condition is the name
    """A judge cannot be reached or refuses the key, or a judgement failed under `fail: stop`."""


class EndpointError(SafeRegError):
    """A model behind an endpoint that does not answer, or refuses what it is asked."""


class CheckpointError(SafeRegError):
    """A run folder or a checkpoint that is incomplete, foreign, or cannot be written."""


class LedgerError(SafeRegError):
    """A ledger whose chain of hashes does not hold."""


class GroupError(SafeRegError):
    """Process groups, ranks or the launcher's environment."""


class PeerLost(GroupError):  # noqa: N818 - the condition is the name
    """Another rank has ended without a word, or the network to it is gone."""


class NonFiniteLoss(SafeRegError):  # noqa: N818 - the condition is the name
    """Several optimizer steps in a row had a loss or gradient that was not finite."""


class RemoteRankError(SafeRegError):
    """Another rank has failed and reports the cause; this rank stops with it."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # the other rank's traceback, whole


_USER_ERRORS = (
    ConfigError,
    DataError,
    ProbeError,
    CriticUnavailable,
    EndpointError,
    CheckpointError,
    LedgerError,
    GroupError,
)


def own_errors() -> tuple[type[Exception], ...]:
    """What to catch: the family and, once its package is loaded, `ShapeError`."""
    loaded = sys.modules.get("safereg_kernels.errors")
    return (SafeRegError,) if loaded is None else (SafeRegError, loaded.ShapeError)


def __getattr__(name: str) -> Any:
    """`ShapeError` on first use: its package loads torch, which a configuration does without."""
    if name == "ShapeError":
        from safereg_kernels.errors import ShapeError

        return ShapeError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_user_error(error: BaseException) -> bool:
    """True if the user can fix the cause; the command line then exits with status 2."""
    return isinstance(error, (*_USER_ERRORS, *own_errors()[1:]))


def reason_of(error: BaseException, limit: int = 300) -> str:
    """The message of another library's error as one line of at most `limit` characters.

    A longer one ends with a sentence, else with a word and three dots.
    """
    text = printable(error)
    if len(text) <= limit:
        return text
    sentences, dot, _ = text[:limit].rpartition(". ")
    return sentences + dot.rstrip() if dot else text[: limit - 4].rsplit(" ", 1)[0] + " ..."
