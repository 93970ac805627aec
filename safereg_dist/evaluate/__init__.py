"""Evaluation: answers of a model, their judges, the figures of merit, and the report.

`generate` answers prompts in batches, `judges` tell refusals from answers, `evaluate` turns both
into one JSON file, `report` (with `figures`) shows runs side by side. Nothing heavy is imported
here, so that a report does not load transformers.
"""

import os
from pathlib import Path

from safereg_dist.errors import CheckpointError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes the whole file or nothing: first a sibling, which then takes the file's place.

    Raises:
        CheckpointError: the place cannot be written (no permission, disk full).
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as err:
        raise CheckpointError(
            f"cannot write {path}: {err.strerror or err}: choose a writable place with free space"
        ) from err
