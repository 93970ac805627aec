"""The regions of a step, by name, and the decorator that bills work to one of them.

A stage names its region once (`@region(PROBE)` on its method, or `with region(PROBE):`). Without a
profiler this costs one comparison; `profile: true` turns on `safereg_dist.profiling`. Work in
nested regions is billed to the innermost one.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

POLICY_FORWARD = "policy forward"
POLICY_BACKWARD = "policy backward"
PROBE = "probe"
CRITIC = "critic"
COEFFICIENT = "coefficient"
AGREEMENT = "agreement"
REFERENCE_TRUNK = "reference trunk"
REFERENCE_HEAD = "reference head"
"""Gathering the reference's head; its products are HEAD_DIVERGENCE."""
HEAD_CE = "head ce"
HEAD_DIVERGENCE = "head divergence"
EXCHANGE = "exchange"
OPTIMIZER = "optimizer"
METRICS = "metrics"
OTHER = "other"
"""Work of a step outside all other regions."""

REGIONS = (
    POLICY_FORWARD,
    POLICY_BACKWARD,
    PROBE,
    CRITIC,
    COEFFICIENT,
    AGREEMENT,
    REFERENCE_TRUNK,
    REFERENCE_HEAD,
    HEAD_CE,
    HEAD_DIVERGENCE,
    EXCHANGE,
    OPTIMIZER,
    METRICS,
    OTHER,
)
"""All regions, in the order of reports."""
SAFETY_PATH = frozenset(
    {
        PROBE,
        CRITIC,
        COEFFICIENT,
        AGREEMENT,
        REFERENCE_TRUNK,
        REFERENCE_HEAD,
        HEAD_DIVERGENCE,
        EXCHANGE,
    }
)
"""The regions that plain fine-tuning does not have."""

P = ParamSpec("P")
R = TypeVar("R")


class RegionListener(Protocol):
    """Is called at the start and the end of every region."""

    def enter(self, name: str) -> None:
        """The region `name` begins."""
        ...

    def leave(self) -> None:
        """The region entered last ends."""
        ...


_listener: RegionListener | None = None


def listen(listener: RegionListener | None) -> RegionListener | None:
    """Sets the listener (None = none) and returns the previous one."""
    global _listener
    before, _listener = _listener, listener
    return before


class region:  # noqa: N801 - reads as a word where it is used
    """Context manager and decorator that names the region of a block or of a function's calls."""

    __slots__ = ("_listener", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._listener: RegionListener | None = None

    def __enter__(self) -> None:
        self._listener = _listener
        if _listener is not None:
            _listener.enter(self._name)

    def __exit__(self, *error: object) -> None:
        if self._listener is not None:
            self._listener.leave()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """The same function, billed to this region."""
        name = self._name

        @wraps(function)
        def billed(*args: P.args, **kwargs: P.kwargs) -> R:
            if _listener is None:
                return function(*args, **kwargs)
            with region(name):
                return function(*args, **kwargs)

        return billed
