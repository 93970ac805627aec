"""YAML that others wrote, read within bounds: small and shallow, aliases counted as what they mean.

An alias stands for all that its anchor holds: ten lines of them can mean a billion values. So the
text is counted before anything is made of it.
"""

from pathlib import Path
from typing import Any

import yaml

LONGEST = 200_000
"""Characters of a YAML file, and of what its aliases mean; the longest known has 10,000."""
DEEPEST = 30
"""Lists and mappings in one another; a configuration has 5."""


class _Loader(yaml.SafeLoader):
    """Plain values, whole numbers of 64 bits."""

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        if not -(1 << 63) <= value < 1 << 64:
            raise yaml.constructor.ConstructorError(
                problem="a whole number beyond 64 bits", problem_mark=node.start_mark
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path | str) -> Any:
    """The value in a YAML file.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
        yaml.YAMLError: as `parse_yaml`.
    """
    with Path(path).open(encoding="utf-8") as file:
        return parse_yaml(file.read(LONGEST + 1))


def parse_yaml(text: str) -> Any:
    """The value that the text describes.

    Raises:
        yaml.YAMLError: it is no YAML, too long or too deep, holds a number beyond 64 bits or a date
            that does not exist.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"longer than {LONGEST} characters")
    _require_small(yaml.parse(text, Loader=_Loader))
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise
    except Exception as err:  # what conversions raise: of a date, of digits, of a tag's value
        raise yaml.YAMLError(f"a value that is none of its kind: {err}") from err


def _require_small(events: Any) -> None:
    """Raises YAMLError where the values, with all aliases written out, are too many or too deep."""
    known: dict[str, tuple[int, int]] = {}  # anchor -> characters and depth of what it holds
    inside: list[tuple[str | None, int, int]] = [(None, 0, 0)]  # the same of what is open
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, 1, 1))
            _require_shallow(len(inside) - 1)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size, depth = inside.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size, depth = event.anchor, 1 + len(event.value), 0
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                raise yaml.YAMLError(f"*{event.anchor} stands before its value ends, or has none")
            anchor, (size, depth) = None, known[event.anchor]
        else:
            continue
        _require_shallow(len(inside) - 1 + depth)
        if anchor is not None:
            known[anchor] = (size, depth)
        around, size_around, depth_around = inside[-1]
        inside[-1] = (around, size_around + size, max(depth_around, depth + 1))
        if inside[-1][1] > LONGEST:
            raise yaml.YAMLError(f"with its aliases longer than {LONGEST} characters")


def _require_shallow(depth: int) -> None:
    if depth > DEEPEST:
        raise yaml.YAMLError(f"more than {DEEPEST} lists or mappings in one another")
