"""Files and folders that are written whole or not at all."""

import os
import shutil
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


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder aside, to fill; it takes the place of `path` when the block succeeds.

    Raises:
        CheckpointError: it cannot be written; what was at `path` is still there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _take_place(aside, path)
    except OSError as err:
        raise CheckpointError(
            f"cannot write {path}: {err.strerror or err}: choose a writable place with free space"
        ) from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _take_place(aside: Path, path: Path) -> None:
    """Renames `aside` to `path`; what was there before is removed after it."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(aside, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
