"""YAML that others wrote, read within bounds: small, shallow, without aliases.

An alias stands for what its anchor holds: ten lines of them can mean a billion values. No
configuration needs one, so they are refused.
"""

from pathlib import Path
from typing import Any

import yaml

LONGEST = 200_000
"""Characters of a YAML file; the longest configuration known has 10,000."""
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
        yaml.YAMLError: it is no YAML, too long, too deep, holds an alias, a number beyond 64 bits
            or a date that does not exist.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"longer than {LONGEST} characters")
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"*{event.anchor} is an alias: write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} lists or mappings in one another")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise
    except Exception as err:  # what conversions raise: of a date, of digits, of a tag's value
        raise yaml.YAMLError(f"a value that is none of its kind: {err}") from err
