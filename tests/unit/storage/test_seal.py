"""Claimed: a cached score that was not written under this user's key is never believed.

Real SQLite files, changed by SQL and byte by byte; real processes race for the key file. All exact.
"""

import multiprocessing
import os
import random
import sqlite3
import stat
from pathlib import Path

import pytest

from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.storage.score_cache import CachedScore, ScoreCache
from safereg_dist.storage.seal import flaw_of, keyed, seal_of, user_key

KEYS = [f"{number:064x}" for number in range(40)]
SCORES = {key: CachedScore(0.5 + n / 100, "S1" if n % 2 else None) for n, key in enumerate(KEYS)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SAFEREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAFEREG_CACHE_KEY", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path) -> Path:
    """A cache of 40 scores of one judge."""
    path = tmp_path / "scores.sqlite"
    cache = ScoreCache(path)
    cache.put_many("judge", SCORES)
    cache.close()
    return path


def sql(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def read(path: Path) -> tuple[dict[str, CachedScore], int]:
    cache = ScoreCache(path)
    try:
        return cache.get_many("judge", KEYS), cache.unbelieved
    finally:
        cache.close()


CHANGES = {
    "freed": "UPDATE scores SET score = 0",
    "negative": "UPDATE scores SET score = -5",
    "text": "UPDATE scores SET score = 'abc'",
    "a number as text": "UPDATE scores SET score = CAST('0.1' AS BLOB)",
    "infinite": "UPDATE scores SET score = 9e999",
    "another category": "UPDATE scores SET category = 'S9'",
    "category of bytes": "UPDATE scores SET category = x'ff00ff'",
    "category that is no text": "UPDATE scores SET category = CAST(x'ff00ff' AS TEXT)",
    "no seal": "UPDATE scores SET seal = NULL",
    "seal of another type": "UPDATE scores SET seal = 7",
    "seals exchanged": "UPDATE scores SET seal = (SELECT min(seal) FROM scores),"
    " score = (SELECT score FROM scores ORDER BY seal DESC LIMIT 1)",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_row_is_as_good_as_missing(file, name, capfd):
    sql(file, CHANGES[name])
    found, unbelieved = read(file)
    assert (found, unbelieved) == ({}, len(KEYS))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert str(file) in said[0]
    assert "asked for again" in said[0]


def test_rows_that_were_not_changed_are_still_found_and_new_ones_replace_the_others(file):
    sql(file, f"UPDATE scores SET score = 0 WHERE score > {SCORES[KEYS[20]].score}")
    found, unbelieved = read(file)
    assert found == {key: SCORES[key] for key in KEYS[:21]}
    assert unbelieved == 19
    cache = ScoreCache(file)
    cache.put_many("judge", SCORES)
    cache.close()
    assert read(file) == (SCORES, 0)


def test_a_row_moved_to_another_place_is_not_believed(file):
    """The score of a harmless row, with its own seal, under the name of a risky one."""
    connection = sqlite3.connect(file)
    first, last = (
        connection.execute(f"SELECT place FROM scores ORDER BY score {order} LIMIT 1").fetchone()[0]
        for order in ("ASC", "DESC")
    )
    connection.execute("DELETE FROM scores WHERE place = ?", (last,))
    connection.execute("UPDATE scores SET place = ? WHERE place = ?", (last, first))
    connection.commit()
    connection.close()
    assert read(file) == ({key: SCORES[key] for key in KEYS[1:-1]}, 1)


def test_a_cache_of_format_1_has_no_seals_and_is_asked_again(tmp_path, capfd):
    path = tmp_path / "old.sqlite"
    sql(
        path,
        f"PRAGMA application_id = {0x53524743}",
        "PRAGMA user_version = 1",
        "CREATE TABLE scores (place BLOB PRIMARY KEY, score REAL NOT NULL, category TEXT)"
        " WITHOUT ROWID",
    )
    import hashlib

    place = hashlib.sha256(f"judge\n{KEYS[0]}".encode()).hexdigest()
    sql(path, f"INSERT INTO scores VALUES (x'{place}', 0.25, NULL)")
    assert read(path) == ({}, 1)
    assert "an earlier version" in capfd.readouterr().err
    cache = ScoreCache(path)
    cache.put_many("judge", SCORES)
    assert cache.get_many("judge", KEYS) == SCORES
    cache.close()


def test_no_flip_in_the_file_gives_another_score(file):
    """400 random bytes: the score as it was, none, or a file that is refused; never another."""
    draw, pristine = random.Random(0), file.read_bytes()
    outcomes = {"same": 0, "missing": 0, "refused": 0}
    for _ in range(400):
        spoilt = bytearray(pristine)
        spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
        for beside in file.parent.glob(f"{file.name}-*"):
            beside.unlink()
        file.write_bytes(spoilt)
        try:
            found, _ = read(file)
        except CheckpointError:
            outcomes["refused"] += 1
            continue
        assert found.items() <= SCORES.items()
        outcomes["same" if found == SCORES else "missing"] += 1
    assert min(outcomes["missing"], outcomes["refused"]) > 0, outcomes


def test_another_users_rows_are_not_believed_unless_both_have_the_secret(file, monkeypatch):
    monkeypatch.setenv("SAFEREG_CACHE", str(file.parent / "of another user"))
    assert read(file) == ({}, len(KEYS))
    monkeypatch.setenv("SAFEREG_CACHE_KEY", "a secret of the whole team")
    cache = ScoreCache(file)
    cache.put_many("judge", SCORES)
    cache.close()
    monkeypatch.setenv("SAFEREG_CACHE", str(file.parent / "of a third user"))
    assert read(file) == (SCORES, 0)
    monkeypatch.setenv("SAFEREG_CACHE_KEY", "a secret of another team")
    assert read(file) == ({}, len(KEYS))


def _key_when(start, found) -> None:
    start.wait()
    found.put(user_key())


def test_processes_that_make_the_key_at_once_agree(own_cache):
    context = multiprocessing.get_context("fork")
    start, found = context.Event(), context.Queue()
    processes = [context.Process(target=_key_when, args=(start, found)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    keys = {found.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(30)
    assert keys == {user_key()}
    assert stat.S_IMODE((own_cache / "seal.key").stat().st_mode) == 0o600
    assert [path.name for path in own_cache.iterdir()] == ["seal.key"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.chmod(0o644), "others may read it"),
        (lambda path: path.write_bytes(b""), "it has 0 bytes"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
    ids=["mode", "empty", "folder"],
)
def test_a_key_that_is_none_is_refused_in_one_line(own_cache, file, spoil, said):
    spoil(own_cache / "seal.key")
    with pytest.raises(ConfigError, match=said) as caught:
        ScoreCache(file)
    assert "\n" not in str(caught.value)


def test_a_short_secret_is_refused(monkeypatch):
    monkeypatch.setenv("SAFEREG_CACHE_KEY", "hunter2")
    with pytest.raises(ConfigError, match="16 characters or more") as caught:
        user_key()
    assert "hunter2" not in str(caught.value)


def test_parts_do_not_run_into_one_another():
    key = os.urandom(32)
    assert keyed(key, b"ab", b"c") != keyed(key, b"a", b"bc") != keyed(key, b"abc")


def test_a_plain_seal_finds_changes_and_a_keyed_one_forgery(monkeypatch):
    plain = seal_of(b"content")
    assert flaw_of(b"content", plain) is None
    assert "changed" in str(flaw_of(b"contents", plain))
    for none in (None, 7, "", "md5:00"):
        assert "no seal" in str(flaw_of(b"content", none))
    monkeypatch.setenv("SAFEREG_CACHE_KEY", "k" * 16)
    assert "not sealed with the key" in str(flaw_of(b"content", plain))
    sealed = seal_of(b"content")
    assert flaw_of(b"content", sealed) is None
    monkeypatch.setenv("SAFEREG_CACHE_KEY", "another key of mine")
    assert "another key" in str(flaw_of(b"content", sealed))
    monkeypatch.delenv("SAFEREG_CACHE_KEY")
    assert "sealed with a key" in str(flaw_of(b"content", sealed))
