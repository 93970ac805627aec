"""Conversations as text through a chat template, which is a program that came with the model.

The template runs in transformers' sandbox, which keeps it from files and from Python's own objects,
but not from running for ever or asking for all memory. So it runs within bounds here. Both are set
for the call alone and by the kernel, without a thread or a process that could stay behind: a timer
whose signal interrupts the template, and a limit on the address space, at which Python raises
MemoryError. The timer needs the main thread (only there Python handles signals) and a process that
has no use of its own for SIGALRM; elsewhere the limit on memory alone holds.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from safereg_dist.errors import DataError, reason_of

try:
    import resource
except ModuleNotFoundError:  # not on every system
    resource = None

SECONDS = 5.0
"""For one conversation; the slowest honest one (thousands of turns) takes a tenth of one."""
MEMORY_BYTES = 2 << 30
"""More address space than the process has at the time."""
_ONE_LIMIT = threading.Lock()  # the process has one: two threads would put back each other's
LONGEST = 8_000_000
"""Characters of a conversation: about two million tokens."""


def rendered(tokenizer: Any, messages: list[Any], where: str, **how: Any) -> Any:
    """The text of a conversation, or of each of a list; `how` as in `apply_chat_template`.

    Raises:
        DataError: the template refuses it, fails, takes more than `SECONDS` or `MEMORY_BYTES`, or
            writes more than `LONGEST` characters; the message begins with `where`.
    """
    with failures_named(where), limited_time(), _limited_memory():
        text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
        length = len(text) if isinstance(text, str) else sum(map(len, text))
        if length > LONGEST:
            raise ValueError(f"{length} characters, more than {LONGEST}")
    return text


@contextmanager
def failures_named(where: str) -> Iterator[None]:
    """A block that runs a template or a tokenizer: what it raises becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as err:  # a template raises whatever its author chose
        raise DataError(
            f"{where}: chat template or tokenizer fail on this conversation "
            f"({reason_of(err) or type(err).__name__}): change the row, or set data.chat_template"
        ) from err


@contextmanager
def limited_time() -> Iterator[None]:
    """A block that gets a TimeoutError after `SECONDS`, in the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"it takes more than {SECONDS:g} s")

    signal.signal(signal.SIGALRM, interrupt)
    try:
        # Again and again: what is raised while an object is being deleted is lost.
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.5)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _limited_memory() -> Any:
    """A block in which an allocation of more than `MEMORY_BYTES` raises MemoryError (Linux).

    Python's own code alone may run in it: others end the process where memory ends.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:
        return nullcontext()
    return nullcontext() if resource is None else _address_space(pages, resource)


@contextmanager
def _address_space(pages: int, limits: Any) -> Iterator[None]:
    with _ONE_LIMIT:
        before, most = limits.getrlimit(limits.RLIMIT_AS)
        wanted = pages * limits.getpagesize() + MEMORY_BYTES
        known = [limit for limit in (before, most) if limit != limits.RLIM_INFINITY]
        limits.setrlimit(limits.RLIMIT_AS, (min([wanted, *known]), most))
        try:
            yield
        finally:
            limits.setrlimit(limits.RLIMIT_AS, (before, most))
