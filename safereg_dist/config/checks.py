"""What a value of the configuration may be; each check names the key in its error."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

from safereg_dist.errors import ConfigError


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ConfigError, naming the nearest, where `value` is not among `allowed`."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def at_least(name: str, value: float, low: float) -> None:
    """Raises ConfigError where `value` is below `low` or not finite."""
    if not low <= value < math.inf:  # nan is refused as well
        raise ConfigError(f"{name} must be finite and at least {low}, got {value}")


def positive(name: str, value: float) -> None:
    """Raises ConfigError where `value` is not positive and finite."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive and finite, got {value}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError where `value` lies outside [low, high]."""
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie in [{low}, {high}], got {value}")
