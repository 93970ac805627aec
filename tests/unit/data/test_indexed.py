"""Claimed: sequences of an indexed data set are those that Megatron's builder wrote, and the risks
beside it are read back for the same data only. Exact.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from support.indexed import write_indexed

from safereg_dist.data.indexed import IndexedTokens, prefix_of, read_risks, write_risks
from safereg_dist.errors import DataError

pytest.importorskip("megatron.core")

SEQUENCES = [[5, 6, 7, 2], [8, 2], [], [60000, 1, 9, 9, 2]]
RISKS = np.array([0.1, 0.7, 0.0, 1.0])


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_indexed(tmp_path / "some_text_document", SEQUENCES)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_sequences_are_those_of_the_builder(tmp_path, dtype):
    data = IndexedTokens(write_indexed(tmp_path / "x", SEQUENCES, dtype))
    assert [data[i].tolist() for i in range(len(data))] == SEQUENCES
    assert [data[i].dtype for i in range(len(data))] == [dtype] * 4
    assert list(data.pieces(3, vocab_size=60001)) == [
        (0, [5, 6, 7]),
        (0, [2]),
        (1, [8, 2]),
        (3, [60000, 1, 9]),
        (3, [9, 2]),
    ]


def test_a_data_set_goes_by_its_prefix_or_either_file(prefix):
    for name in (prefix, f"{prefix}.idx", f"{prefix}.bin"):
        assert prefix_of(name) == prefix
    assert prefix_of(prefix.with_name("rows.jsonl")) is None


def test_risks_are_read_back_to_the_bit(prefix, tmp_path):
    data, elsewhere = IndexedTokens(prefix), tmp_path / "deep" / "stem"
    for stem in (prefix, elsewhere):
        write_risks(data, RISKS, {"scorer": "a judge"}, stem)
        known = json.loads(Path(f"{stem}.risk.json").read_text())
        assert (known["scorer"], known["sequences"]) == ("a judge", 4)
    assert read_risks(prefix).tolist() == RISKS.tolist()
    assert read_risks(prefix, elsewhere).tolist() == RISKS.tolist()


def same_lengths(prefix):
    write_indexed(prefix, [[5, 6, 7, 2], [8, 2], [], [60000, 1, 9, 8, 2]])


def one_more(prefix):
    write_indexed(prefix, [*SEQUENCES, [1]])


def wrong(*risks):
    return lambda prefix: write_risks(IndexedTokens(prefix), np.array(risks), {}, prefix)


def replace(name, content):
    return lambda prefix: Path(f"{prefix}{name}").write_bytes(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (same_lengths, "written for other data than .* is now"),
        (one_more, r"\(4 sequences, here 5;"),
        (wrong(0.1, 0.2, 0.3, 1.5), "sequence 3 has risk 1.5, expected a number in"),
        (wrong(0.1, np.nan, 0.3, 0.5), "sequence 1 has risk nan, expected a number in"),
        (wrong(0.1, 0.2), r"expected 4 numbers of float64, got float64 of shape \(2,\)"),
        (replace(".risk.json", b"[]"), "cannot be read"),
        (replace(".risk.npy", b"\x93NUMPY"), "cannot be read"),
        (lambda p: Path(f"{p}.risk.npy").unlink(), "found no some_text_document.risk.npy"),
        (lambda p: Path(f"{p}.risk.json").unlink(), "found no some_text_document.risk.json"),
        (lambda p: np.save(f"{p}.risk.npy", np.array([{}] * 4)), "cannot be read"),
    ],
)
def test_risks_of_other_data_and_values_that_are_none(prefix, change, said):
    write_risks(IndexedTokens(prefix), RISKS, {}, prefix)
    change(prefix)
    with pytest.raises(DataError, match=f"(?s){said}.*safereg score --data {prefix}"):
        read_risks(prefix)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace(".idx", b"MMIDIDX\x00\x00"), "no whole index"),
        (replace(".idx", b"\x00" * 200), "no whole index"),
        (replace(".bin", b"\x00" * 12), "has 12 bytes, its index names 44"),
        (lambda p: Path(f"{p}.bin").unlink(), "found no file .*bin"),
        (lambda p: write_indexed(p, []), "holds no sequence"),
        (lambda p: write_indexed(p, [[1.5]], np.float32), "with tokens"),
    ],
)
def test_files_that_are_no_data_set(prefix, change, said):
    change(prefix)
    with pytest.raises(DataError, match=said):
        IndexedTokens(prefix)


def test_a_token_that_the_tokenizer_does_not_have(prefix):
    with pytest.raises(DataError, match=r"sequence 3 of .* has token 60000, the tokenizer has 100"):
        list(IndexedTokens(prefix).pieces(8, vocab_size=100))
