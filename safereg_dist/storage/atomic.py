"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safereg_dist.errors import CheckpointError


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is renamed to its path, replacing an older one, when the block succeeds.

    Raises:
        CheckpointError: the file cannot be written (no permission, disk full).
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                yield file
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as err:
        raise CheckpointError(
            f"cannot write {path}: {err.strerror or err}: choose a writable place with free space"
        ) from err


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes the whole file or nothing.

    Raises:
        CheckpointError: as `whole_file`.
    """
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
