"""The score cache: what was put is found again, by every process, after any death.

Claimed: scores and categories come back bit for bit, under their own scorer only; several processes
that create the file and write at once lose nothing; a process that is killed while it writes leaves
whole transactions; a file that is not ours is refused and left alone. All of it is exact.
"""

import hashlib
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from safereg_dist.errors import CheckpointError
from safereg_dist.storage.score_cache import CachedScore, ScoreCache, default_cache_path

WRITERS, BATCHES, BATCH = 4, 12, 25


def key(number: int) -> str:
    return hashlib.sha256(f"text {number}".encode()).hexdigest()


def score(number: int) -> CachedScore:
    return CachedScore(number % 997 / 996, f"S{number % 14}" if number % 3 else None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "scores.sqlite"


def test_what_was_put_is_found_again(path: Path) -> None:
    scores = {key(n): score(n) for n in range(1203)}
    cache = ScoreCache(path)
    cache.put_many("judge a", scores)
    cache.put_many("judge b", {key(0): CachedScore(0.1 + 0.2)})
    cache.put_many("judge a", {})
    cache.close()
    again = ScoreCache(path)
    wanted = [*scores, key(5000), key(0), key(0)]
    assert again.get_many("judge a", wanted) == scores
    assert again.get_many("judge b", wanted) == {key(0): CachedScore(0.1 + 0.2, None)}
    assert again.get_many("judge c", wanted) == {}
    assert again.get_many("judge a", []) == {}
    again.put_many("judge a", {key(1): CachedScore(1.0, "S9")})
    assert again.get_many("judge a", [key(1)]) == {key(1): CachedScore(1.0, "S9")}
    again.close()


@pytest.mark.parametrize("bad", [float("nan"), -0.01, 1.01, float("inf")])
def test_no_score_outside_the_range_is_kept(path: Path, bad: float) -> None:
    cache = ScoreCache(path)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        cache.put_many("judge", {key(0): CachedScore(0.5), key(1): CachedScore(bad)})
    assert cache.get_many("judge", [key(0), key(1)]) == {}
    cache.close()


def test_a_transaction_that_fails_in_the_middle_leaves_nothing(path: Path) -> None:
    cache = ScoreCache(path)
    cache.put_many("judge", {key(0): score(0)})
    unbindable: Any = object()
    rows = {key(0): CachedScore(0.75), key(1): score(1), key(2): CachedScore(0.5, unbindable)}
    with pytest.raises(CheckpointError, match="cannot be used"):
        cache.put_many("judge", rows)
    for reader in (cache, ScoreCache(path)):
        assert reader.get_many("judge", list(rows)) == {key(0): score(0)}
    cache.put_many("judge", {key(1): score(1)})  # no transaction is left open
    assert len(reader.get_many("judge", list(rows))) == 2
    reader.close()
    cache.close()


def test_the_default_path_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEREG_CACHE", "/somewhere")
    assert default_cache_path() == Path("/somewhere/scores.sqlite")
    monkeypatch.delenv("SAFEREG_CACHE")
    assert default_cache_path() == Path.home() / ".cache/safereg/scores.sqlite"


def _write_many(path: Path, writer: int, start) -> None:
    start.wait()
    cache = ScoreCache(path)
    for batch in range(BATCHES):
        first = (writer * BATCHES + batch) * BATCH
        cache.put_many("judge", {key(n): score(n) for n in range(first, first + BATCH)})
        assert cache.get_many("judge", [key(first)]) == {key(first): score(first)}
    cache.close()


def test_processes_that_create_and_write_at_once_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(3):  # the race to create the file is the delicate moment
        file = path.with_name(f"{attempt}.sqlite")
        start = context.Event()
        writers = [
            context.Process(target=_write_many, args=(file, w, start)) for w in range(WRITERS)
        ]
        for writer in writers:
            writer.start()
        start.set()
        for writer in writers:
            writer.join(60)
        assert [writer.exitcode for writer in writers] == [0] * WRITERS
        cache = ScoreCache(file)
        everything = range(WRITERS * BATCHES * BATCH)
        found = cache.get_many("judge", [key(n) for n in everything])
        assert found == {key(n): score(n) for n in everything}
        cache.close()


def test_threads_share_one_cache(path: Path) -> None:
    cache = ScoreCache(path)
    errors = []

    def work(writer: int) -> None:
        try:
            for n in range(writer * 40, writer * 40 + 40):
                cache.put_many("judge", {key(n): score(n)})
                assert cache.get_many("judge", [key(n)]) == {key(n): score(n)}
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=work, args=(w,)) for w in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(cache.get_many("judge", [key(n) for n in range(200)])) == 200
    cache.close()


def test_a_forked_child_neither_uses_nor_closes_its_parents_connection(path: Path) -> None:
    cache = ScoreCache(path)
    cache.put_many("judge", {key(0): score(0)})

    def times_open() -> int:
        links = (os.path.realpath(link) for link in Path("/proc/self/fd").glob("*"))
        return sum(link == os.path.realpath(path) for link in links)

    def child() -> None:
        of_parent = times_open()
        cache.put_many("judge", {key(1): score(1)})
        found = cache.get_many("judge", [key(0), key(1)])
        is_own = times_open() > of_parent or not Path("/proc/self/fd").is_dir()
        cache.close()
        is_kept = times_open() >= of_parent
        os._exit(0 if len(found) == 2 and is_own and is_kept else 3)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    cache.put_many("judge", {key(2): score(2)})
    assert len(cache.get_many("judge", [key(n) for n in range(3)])) == 3
    cache.close()


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_score_cache import key, score
from safereg_dist.storage.score_cache import ScoreCache
cache = ScoreCache({path!r})
for batch in range(100000):
    cache.put_many("judge", {{key(n): score(n) for n in range(batch * 50, batch * 50 + 50)}})
    print(batch, flush=True)
"""


def test_a_process_killed_while_it_writes_leaves_whole_transactions(path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 20:
                process.send_signal(signal.SIGKILL)
                break
        told = [int(line), *map(int, process.stdout.read().split())][-1]
        assert process.wait() == -signal.SIGKILL
    cache = ScoreCache(path)
    found = cache.get_many("judge", [key(n) for n in range((told + 3) * 50)])
    assert len(found) in ((told + 1) * 50, (told + 2) * 50)  # one may be stored but not told
    assert all(found[key(n)] == score(n) for n in range((told + 1) * 50))
    cache.put_many("judge", {key(-1): score(1)})
    cache.close()


def foreign_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()


def later_format(path: Path) -> None:
    ScoreCache(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    connection.close()


def database_of_another_program(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA application_id = 7")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"garbage" * 1000), "not a database"),
        (foreign_database, "expected a score cache of format 2"),
        (later_format, "format 99"),
        (database_of_another_program, "a database of application 0x7"),
        (lambda path: path.mkdir(), "unable to open"),
    ],
    ids=["garbage", "another database", "later format", "another program", "folder"],
)
def test_what_is_no_score_cache_is_refused_and_left_alone(tmp_path: Path, spoil, said) -> None:
    path = tmp_path / "scores.sqlite"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(CheckpointError, match=said) as caught:
        ScoreCache(path)
    assert str(path) in str(caught.value)
    assert "delete it, or name another" in str(caught.value)
    assert before is None or path.read_bytes() == before


def test_a_writer_waits_for_another_one(path: Path) -> None:
    cache = ScoreCache(path)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    writer = threading.Thread(target=cache.put_many, args=("judge", {key(0): score(0)}))
    writer.start()
    time.sleep(0.2)
    assert cache.get_many("judge", [key(0)]) == {}  # readers do not wait
    assert writer.is_alive()
    other.execute("COMMIT")
    other.close()
    writer.join()
    assert cache.get_many("judge", [key(0)]) == {key(0): score(0)}
    cache.close()
