"""The parts of a step, by name, and the mark that bills work to one of them.

A stage says once which part it is (`@region(PROBE)` on its method, or `with region(PROBE):`). Where
nothing records, the mark costs one comparison; `safereg_dist.profiling` listens where a run asks
for it (`profile: true`). A part entered inside another is billed to the inner one.
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
"""All of a step that no part has claimed."""

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
"""All parts, in the order in which they are listed."""
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
"""The parts that plain fine-tuning does not have."""

P = ParamSpec("P")
R = TypeVar("R")


class RegionListener(Protocol):
    """What is told of parts while it listens."""

    def enter(self, name: str) -> None:
        """Work from here on belongs to this part."""
        ...

    def leave(self) -> None:
        """The part entered last has ended."""
        ...


_listener: RegionListener | None = None


def listen(listener: RegionListener | None) -> RegionListener | None:
    """Sets who is told of parts from now on (None = nobody); the one before is returned."""
    global _listener
    before, _listener = _listener, listener
    return before


class region:  # noqa: N801 - reads as a word where it is used
    """A mark around a block, or around every call of a function, that names its part."""

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
        """The same function, billed to this part."""
        name = self._name

        @wraps(function)
        def billed(*args: P.args, **kwargs: P.kwargs) -> R:
            if _listener is None:
                return function(*args, **kwargs)
            with region(name):
                return function(*args, **kwargs)

        return billed
