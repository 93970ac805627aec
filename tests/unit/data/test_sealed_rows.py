"""Claimed: tokenised rows that were changed on disk are made again, never trained on.

Real files, changed bit by bit, cut, swapped, or replaced with a digest beside; processes that mend
one entry at once leave one whole entry. All exact.
"""

import hashlib
import json
import multiprocessing
import random
import shutil
import struct
from pathlib import Path

import pytest
from support.builders import word_tokenizer

from safereg_dist.config import DataConfig
from safereg_dist.data import tokenized
from safereg_dist.data.tokenized import load_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SAFEREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAFEREG_CACHE_KEY", raising=False)
    return tmp_path / "cache" / "rows"


def data_file(folder: Path, words: str = "w1 w2", count: int = 30) -> Path:
    path = folder / f"{words.replace(' ', '')}.jsonl"
    rows = [{"prompt": f"{words} w{n % 9}", "response": "w3 w4", "risk": 0.9} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path):
    return load_rows(str(path), word_tokenizer(), DataConfig(train=str(path)), progress=False)


def contents(store) -> list:
    return [store.row(index) for index in range(len(store))]


@pytest.fixture
def entry(tmp_path, cache) -> Path:
    load(data_file(tmp_path))
    (folder,) = cache.iterdir()
    return folder


def with_counts(folder: Path, **changes) -> None:
    path = folder / "counts.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def freed(folder: Path) -> None:
    """All risks 0, and a digest in place of the seal: a forger without the key."""
    path = folder / "rows.arrow"
    risk, none = (struct.pack("<d", value) for value in (0.9, 0.0))
    content = path.read_bytes()
    assert content.count(risk) >= 30
    path.write_bytes(content.replace(risk, none))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with_counts(folder, seal=hashlib.sha256(digest.encode()).hexdigest())


CHANGES = {
    "risks set to 0": freed,
    "counts": lambda folder: with_counts(folder, dropped=3),
    "no seal": lambda folder: with_counts(folder, seal=None),
    "seal that is none": lambda folder: with_counts(folder, seal="xyz"),
    "counts of an earlier version": lambda folder: (folder / "counts.json").write_text(
        '{"kept": 30, "overlong": 0, "dropped": 0}'
    ),
    "counts that are no object": lambda folder: (folder / "counts.json").write_text("[1]"),
    "broken counts": lambda folder: (folder / "counts.json").write_text('{"kept": 3'),
    "counts that nest": lambda folder: (folder / "counts.json").write_text("[" * 100_000),
    "counts of bytes": lambda folder: (folder / "counts.json").write_bytes(b"\xff\xfe"),
    "no rows": lambda folder: (folder / "rows.arrow").unlink(),
    "rows cut": lambda folder: (folder / "rows.arrow").write_bytes(
        (folder / "rows.arrow").read_bytes()[:-64]
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_entry_is_made_again(tmp_path, entry, name, capfd):
    path = data_file(tmp_path)
    before = contents(load(path))
    assert capfd.readouterr().err == ""
    CHANGES[name](entry)
    assert contents(load(path)) == before
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert "they are made again" in said[0]
    assert contents(load(path)) == before
    assert capfd.readouterr().err == ""


def test_no_flip_is_believed(tmp_path, entry):
    path, draw = data_file(tmp_path), random.Random(0)
    before = contents(load(path))
    pristine = {file: file.read_bytes() for file in sorted(entry.iterdir())}
    assert {file.name for file in pristine} == {"counts.json", "rows.arrow"}
    for _ in range(100):
        file = draw.choice(list(pristine))
        spoilt = bytearray(pristine[file])
        spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
        file.write_bytes(spoilt)
        counts = tokenized._believed_counts(entry)  # a digit of the seal may become a capital
        assert counts is None or (counts["kept"] == len(before) and file.suffix == ".json")
        file.write_bytes(pristine[file])
    assert contents(load(path)) == before


def test_the_entry_of_other_data_is_not_believed(tmp_path, cache, entry):
    other = data_file(tmp_path, "w7")
    rows = contents(load(other))
    (others,) = set(cache.iterdir()) - {entry}
    shutil.rmtree(others)
    shutil.copytree(entry, others)
    assert contents(load(other)) == rows


def _load_when(start, path: Path, found) -> None:
    start.wait()
    found.put([row.id for row in contents(load(path))])


def test_processes_that_mend_an_entry_at_once_agree(tmp_path, cache, entry):
    path = data_file(tmp_path)
    ids = [row.id for row in contents(load(path))]
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        freed(entry)
        start, found = context.Event(), context.Queue()
        processes = [
            context.Process(target=_load_when, args=(start, path, found)) for _ in range(4)
        ]
        for process in processes:
            process.start()
        start.set()
        assert [found.get(timeout=120) for _ in processes] == [ids] * len(processes)
        for process in processes:
            process.join(60)
        assert [each.name for each in cache.iterdir()] == [entry.name]
        assert {row.risk for row in contents(load(path))} == {0.9}
