"""JSON that others wrote, of which whatever is wrong is one error, and values for our own."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def json_ready(value: Any) -> Any:
    """The value with paths as texts, and None for nan and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(name): json_ready(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str | bytes) -> Any:
    """The value that the text describes.

    Raises:
        json.JSONDecodeError: it is no JSON, nested too deeply, has a whole number of thousands of
            digits, or its bytes are no UTF-8.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as err:
        raise json.JSONDecodeError("nested too deeply", "", 0) from err
    except UnicodeDecodeError as err:
        raise json.JSONDecodeError("not UTF-8", "", 0) from err
    except ValueError as err:  # Python converts 4300 digits at most
        raise json.JSONDecodeError("a number of too many digits", "", 0) from err


def json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file of JSON lines, also while it is written.

    A last line without its end, and lines that hold something else, are left out; a file that is
    not there has none.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                found = json_object(line)
                if found is not None:
                    yield found
    except OSError:
        return


def json_object(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line, with its end; None where it is cut or holds something else."""
    try:
        found = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
