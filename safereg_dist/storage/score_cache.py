"""A cache of scores: one SQLite file, shared by all ranks and processes of a node.

The file is in write-ahead mode: readers never wait for the one writer, and a process that is killed
in the middle leaves the last complete transaction behind. That mode keeps shared memory beside the
file, so it needs a local disk: one file per node, never a network file system.

The key of a score is everything it depends on: its scorer (the model, its prompt, every option) and
the SHA-256 of the scored text. Neither the text nor a failure is stored.

A row carries a seal over its key, score and category (`storage.seal`). One that does not hold
(a row that was changed, moved or damaged, another user's, one of format 1, which had no seals) is
as good as missing: it is counted, and whoever asked asks the scorer again.
"""

import hashlib
import hmac
import math
import os
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safereg_dist.errors import CheckpointError
from safereg_dist.storage.seal import KEY_VARIABLE, cache_folder, keyed, user_key

_APPLICATION = 0x53524743  # "SRGC": marks the file as ours
_FORMAT = 2  # raise it when the table changes
_UNSEALED = 1  # the format before: the same table without seals
_COLUMNS = "place, score, category, seal"
_BUSY_S = 60.0  # many ranks may be writing; a transaction takes milliseconds
_KEYS_AT_ONCE = 500  # below SQLite's oldest limit of 999 variables


class CachedScore(NamedTuple):
    """A score in [0, 1] and the category of harm, where the scorer names one."""

    score: float
    category: str | None = None


def default_cache_path() -> Path:
    """`scores.sqlite` in $SAFEREG_CACHE, by default in ~/.cache/safereg."""
    return cache_folder() / "scores.sqlite"


class ScoreCache:
    """An open cache file; every thread and every process has its own connection.

    Raises:
        CheckpointError: here or in any call: the file is no score cache, or another format's, or
            cannot be read or written.
        ConfigError: there is no key to seal with (`seal.user_key`).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        self.unbelieved = 0
        """Rows so far whose seal did not hold."""
        self._key = user_key()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._opened: list[sqlite3.Connection] = []
        self._owner = os.getpid()
        self._connection()

    def get_many(self, scorer: str, keys: Sequence[str]) -> dict[str, CachedScore]:
        """The cached scores of these keys (SHA-256, hex); unknown keys are left out.

        So are rows whose seal does not hold: they are counted, and the first is said on stderr.
        """
        wanted = {_place(scorer, key): key for key in keys}
        places, found = list(wanted), {}
        with self._explained():
            for start in range(0, len(places), _KEYS_AT_ONCE):
                some = places[start : start + _KEYS_AT_ONCE]
                marks = ",".join("?" * len(some))
                query = f"SELECT {_COLUMNS} FROM scores WHERE place IN ({marks})"
                for place, score, category, seal in self._connection().execute(query, some):
                    if place in wanted and self._is_own(place, score, category, seal):
                        found[wanted[place]] = CachedScore(score, category)
                    else:
                        self._count_unbelieved()
        return found

    def put_many(self, scorer: str, scores: Mapping[str, CachedScore]) -> None:
        """Stores scores in one transaction: all of them or, if the process dies, none.

        Raises:
            ValueError: a score outside [0, 1]; a caller's mistake that must not be kept.
        """
        for key, cached in scores.items():
            if not (math.isfinite(cached.score) and 0 <= cached.score <= 1):
                raise ValueError(f"a score must lie in [0, 1], got {cached.score} for {key}")
        rows = [self._sealed(_place(scorer, key), *cached) for key, cached in scores.items()]
        with self._explained(), _transaction(self._connection()) as connection:
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Closes the connections of all threads of this process."""
        with self._lock:
            opened, self._opened = self._opened, []
        self._local = threading.local()
        if os.getpid() == self._owner:  # a forked child must leave its parent's files alone
            for connection in opened:
                connection.close()

    def _sealed(self, place: bytes, score: float, category: str | None) -> tuple:
        return place, score, category, self._seal(place, float(score), category)

    def _seal(self, place: bytes, score: float, category: Any) -> bytes:
        named = [] if category is None else [str(category).encode("utf-8", "surrogatepass")]
        return keyed(self._key, place, struct.pack("<d", score), *named)

    def _is_own(self, place: bytes, score: Any, category: Any, seal: Any) -> bool:
        """True where this is, to the bit, a row that was put here under this key."""
        return (
            type(score) is float
            and 0 <= score <= 1
            and isinstance(category, str | None)
            and isinstance(seal, bytes)
            and hmac.compare_digest(seal, self._seal(place, score, category))
        )

    def _count_unbelieved(self) -> None:
        self.unbelieved += 1
        if self.unbelieved == 1:
            print(
                f"safereg: scores in {self.path} do not carry the seal of this user's key and are "
                "asked for again: they were changed or damaged, or written by another user or an "
                f"earlier version; to share a cache, set {KEY_VARIABLE} to the same secret for all",
                file=sys.stderr,
                flush=True,
            )

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection; SQLite forbids carrying one over a fork."""
        if getattr(self._local, "process", None) != os.getpid():
            with self._explained():
                connection = _open(self.path)
            with self._lock:
                if self._owner != os.getpid():
                    self._opened, self._owner = [], os.getpid()
                self._opened.append(connection)
            self._local.connection, self._local.process = connection, os.getpid()
        return self._local.connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as err:
            raise CheckpointError(
                f"the score cache {self.path} cannot be used ({err}): delete it, or name another "
                "file on a local disk with free space (SAFEREG_CACHE or the key `cache`)"
            ) from err


def _place(scorer: str, key: str) -> bytes:
    """The primary key: one digest of scorer and content."""
    return hashlib.sha256(f"{scorer}\n{key}".encode()).digest()


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    # isolation_level None: transactions are begun by us; the other switch lets `close` reach it.
    connection = sqlite3.connect(
        path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
    )
    # A damaged category must not hide the rows beside it: its seal does not hold, that is enough.
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    try:
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    """Makes the table in an empty file, and refuses a file that is not ours."""
    with _transaction(connection):
        application, version, tables = (
            connection.execute(query).fetchone()[0]
            for query in (
                "PRAGMA application_id",
                "PRAGMA user_version",
                "SELECT count(*) FROM sqlite_master",
            )
        )
        if (application, version, tables) == (0, 0, 0):
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {_FORMAT}")
            connection.execute(
                "CREATE TABLE scores (place BLOB PRIMARY KEY, score REAL NOT NULL, category TEXT,"
                " seal BLOB) WITHOUT ROWID"
            )
        elif (application, version) == (_APPLICATION, _UNSEALED):
            connection.execute("ALTER TABLE scores ADD COLUMN seal BLOB")
            connection.execute(f"PRAGMA user_version = {_FORMAT}")
        elif (application, version) != (_APPLICATION, _FORMAT):
            raise sqlite3.DatabaseError(
                f"expected a score cache of format {_FORMAT}, found a database of application "
                f"{application:#x}, format {version}"
            )
    _write_ahead(connection)
    # Survives the death of the process; only a power cut may take the last transactions.
    connection.execute("PRAGMA synchronous = NORMAL")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switches the file to write-ahead mode; SQLite does not wait for others there, so we do."""
    give_up = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.01)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
