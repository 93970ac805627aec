"""What a value may be; each check names the key in its error."""

import difflib
from collections.abc import Sequence
from typing import Any

from safereg_dist.errors import ConfigError


def hint(value: Any, allowed: Sequence[Any]) -> str:
    """The nearest of the allowed texts as a question; empty where none is near."""
    near = difflib.get_close_matches(str(value), [str(each) for each in allowed], n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ConfigError, naming the nearest, where `value` is not among `allowed`."""
    if value not in allowed:
        raise ConfigError(
            f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint(value, allowed)}"
        )


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError where `value` lies outside [low, high]."""
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie in [{low}, {high}], got {value}")
