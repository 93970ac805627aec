"""A rank that others lose in a collective, told in one line.

Gloo and NCCL report it as an error of the library, out of whatever waited: a collective, a handle,
a backward pass. What all have in common is that this rank cannot go on, and that the run can.
"""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safereg_dist.errors import PeerLost, reason_of

# gloo names itself, but in what it says to the waits after the first that has timed out.
_LIBRARIES = re.compile(r"gloo|nccl|tcpstore|store->|caused pair closure", re.IGNORECASE)
_SIGNS = re.compile(
    r"timed? ?out|closed|reset|broken pipe|refused|unreachable|no route|recv|remote process",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"\[?([0-9a-f]*[.:][0-9a-f.:]*)\]?:\d+")
_THEIRS = ("/site-packages/", "/contextlib.py")


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """A block in which the error of a collective that lost a rank becomes `PeerLost`.

    Raises:
        PeerLost: a rank has ended, or the network to it is gone; with the collective, our line
            that waited for it, and the peer's address where the library knows it.
    Collectives: none; the others find out by themselves, within `engine.timeout_s`.
    """
    try:
        yield
    except RuntimeError as error:  # torch's DistBackendError and DistNetworkError are such
        if not is_lost_peer(error):
            raise
        raise PeerLost(_message(error)) from error


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective's library says that it can no longer reach another rank."""
    from torch.distributed import DistError

    text = str(error)
    is_theirs = isinstance(error, DistError) or _LIBRARIES.search(text) is not None
    return is_theirs and _SIGNS.search(text) is not None


def _message(error: RuntimeError) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f.name for f in frames if Path(f.filename).name == "distributed_c10d.py"]
    ours = [f for f in frames if not any(part in f.filename for part in _THEIRS)]
    place = (ours or frames)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    address = _ADDRESS.search(str(error).rsplit(".cc:", 1)[-1].partition("]")[2])
    peer = f" at {address[1]}" if address else ""
    return (
        f"expected every rank in {inside[-1] if inside else 'a collective'} ({where}), but one"
        f"{peer} has ended or cannot be reached ({_short(error)}): look for the first message of "
        "its host; the same command goes on from the newest checkpoint"
    )


def _short(error: RuntimeError) -> str:
    """The library's first sentence, without its source file."""
    return re.sub(r"\[/?\S*\.cc:\d+\]\s*", "", reason_of(error)).split(". ")[0][:160]
