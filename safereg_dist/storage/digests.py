"""Digests of files: of whole ones, and running ones of files that only grow."""

import hashlib
import os
from pathlib import Path
from typing import IO, NamedTuple

_AT_ONCE = 1 << 20


class FileDigest(NamedTuple):
    """A file's length in bytes and its SHA-256 (hex)."""

    bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.bytes} bytes of SHA-256 {self.sha256[:12]}"


def digest_of(path: Path, length: int | None = None, *, sync: bool = False) -> FileDigest:
    """The digest of a file, or of its first `length` bytes; of fewer where the file is shorter.

    `sync` has the system put the file on the disk first.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        running, total = hashed(file, length)
    return FileDigest(total, running.hexdigest())


def copied(source: Path, target: Path) -> FileDigest:
    """Copies a file to where there is none, making folders; its digest. It is on the disk then.

    Raises:
        OSError: it cannot be read or written, or `target` is there already.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file, target.open("xb") as copy:
        running, total = hashed(file, None, copy=copy)
        copy.flush()
        os.fsync(copy.fileno())
    return FileDigest(total, running.hexdigest())


def hashed(
    file: IO[bytes], length: int | None, *, copy: IO[bytes] | None = None
) -> "tuple[hashlib._Hash, int]":
    """The SHA-256, and the number, of the next `length` bytes; of all where None, or of fewer.

    They are written to `copy` too.
    """
    running, total = hashlib.sha256(), 0
    while data := file.read(_AT_ONCE if length is None else min(_AT_ONCE, length - total)):
        running.update(data)
        total += len(data)
        if copy is not None:
            copy.write(data)
    return running, total


class AppendedFile:
    """A binary file that only grows, with the running digest of all that it holds.

    Opening keeps what the file holds. Errors are the system's (OSError).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab")
        self._running: hashlib._Hash | None = None  # until something is written or asked for

    def write(self, data: bytes) -> None:
        """Adds to the buffer."""
        running = self._digested()
        self._file.write(data)
        running.update(data)

    def flush(self) -> int:
        """Hands the buffer to the system and returns the file's length in bytes; no fsync."""
        self._file.flush()
        return self._file.tell()

    def digest(self) -> FileDigest:
        """Of all that was written so far; flushes."""
        return FileDigest(self.flush(), self._digested().hexdigest())

    def truncate(self, position: int) -> None:
        """Drops everything after byte `position`."""
        self._file.flush()
        self._file.truncate(position)
        self._file.seek(position)
        self._running = None

    def close(self) -> None:
        """Flushes and closes; closing twice is harmless."""
        self._file.close()

    def _digested(self) -> "hashlib._Hash":
        if self._running is None:
            self._file.flush()
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size  # a device may never end
                self._running, _ = hashed(file, size)
        return self._running
