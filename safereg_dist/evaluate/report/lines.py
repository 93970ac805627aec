"""JSON and JSONL files that runs leave behind, as far as they can be read."""

from pathlib import Path
from typing import Any

from safereg_dist.errors import CheckpointError
from safereg_dist.evaluate.report.arms import as_object
from safereg_dist.storage.json_text import parse_json


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file.

    Raises:
        CheckpointError: not JSON.
    """
    if not path.is_file():
        return {}
    try:
        return as_object(parse_json(path.read_bytes()))
    except ValueError as err:
        raise CheckpointError(f"{path} is not JSON ({err}): write it again or remove it") from err


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file; a last line that a kill cut short is left out.

    Raises:
        CheckpointError: another line is not JSON; `json_text.json_objects` leaves such lines out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as err:
            if line_number == len(lines):
                continue
            raise CheckpointError(
                f"{path}:{line_number} is not JSON: the file was altered or its disk was full; "
                "remove the line to report on the rest"
            ) from err
        if isinstance(row, dict):
            rows.append(row)
    return rows
