"""Megatron's indexed data sets (PREFIX.idx, PREFIX.bin) and the risk of each of their sequences.

An index names the type of a token and, of every sequence, its length and where it begins in the
data. A sequence is what Megatron's GPT data sets call a document. Risks lie beside the data: in
STEM.risk.npy a number for each sequence, in STEM.risk.json what they were found for and by.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safereg_dist.errors import DataError, reason_of
from safereg_dist.storage.atomic import whole_file, write_atomically

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, type of a token, number of sequences, number of documents and 1."""
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of the types of a token; 6 and 7 are floats, which are none."""
_FORMAT = 1
_BLOCK, _BLOCKS = 4096, 256
"""What is hashed of the data: so many bytes at so many places, since data sets reach terabytes."""


class IndexedTokens:
    """The token sequences of one data set, memory-mapped."""

    def __init__(self, prefix: str | Path) -> None:
        """Raises DataError: there is no such data set, or one that cannot be read."""
        self.prefix = str(prefix)
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise DataError(
                    f"expected an indexed data set at {prefix}, found no file {path}: give the "
                    "common beginning of its .idx and .bin, on a local disk"
                )
        with index.open("rb") as file:
            head = file.read(_HEADER.size).ljust(_HEADER.size, b"\0")
        magic, version, code, count, _ = _HEADER.unpack(head)
        is_whole = index.stat().st_size >= _HEADER.size + 12 * count
        if (magic, version) != (_MAGIC, 1) or code not in _TYPES or not is_whole:
            raise DataError(
                f"{index} is no whole index of version 1 with tokens: write it with Megatron's "
                "IndexedDatasetBuilder"
            )
        if count == 0:
            raise DataError(f"{index} holds no sequence: give at least one")
        self._type = np.dtype(_TYPES[code])
        self.lengths = np.memmap(index, "<i4", "r", _HEADER.size, (count,))
        self._begins = np.memmap(index, "<i8", "r", _HEADER.size + 4 * count, (count,))
        self._data = np.memmap(data, "u1", "r") if data.stat().st_size else np.empty(0, "u1")
        end = int((self._begins + self.lengths.astype("i8") * self._type.itemsize).max())
        if end > len(self._data):
            raise DataError(
                f"{data} has {len(self._data)} bytes, its index names {end}: copy it again"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        begin, length = int(self._begins[index]), int(self.lengths[index])
        return self._data[begin : begin + length * self._type.itemsize].view(self._type)

    def pieces(self, size: int, *, vocab_size: int) -> Iterator[tuple[int, list[int]]]:
        """Yields (sequence, at most `size` tokens) until all are read, in order.

        Raises:
            DataError: a token that is not below `vocab_size`.
        """
        for index in range(len(self)):
            tokens = self[index]
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                raise DataError(
                    f"sequence {index} of {self.prefix} has token {int(tokens.max())}, the "
                    f"tokenizer has {vocab_size}: give the one that the data was made with"
                )
            for begin in range(0, len(tokens), size):
                yield index, tokens[begin : begin + size].tolist()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the index, the size of the data, and 1 MiB of it in blocks all over."""
        hasher = hashlib.sha256()
        with Path(f"{self.prefix}.idx").open("rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
        hasher.update(str(len(self._data)).encode())
        last = max(len(self._data) - _BLOCK, 0)
        for begin in np.linspace(0, last, _BLOCKS).astype("i8").tolist():
            hasher.update(self._data[begin : begin + _BLOCK].tobytes())
        return hasher.hexdigest()


def prefix_of(path: str | Path) -> Path | None:
    """The prefix of the indexed data set that `path` names by itself or by one of its two files."""
    if Path(path).suffix in (".idx", ".bin"):
        return Path(path).with_suffix("")
    return Path(path) if Path(f"{path}.idx").is_file() else None


def write_risks(
    data: IndexedTokens, risks: np.ndarray, facts: Mapping[str, Any], stem: Path
) -> Path:
    """Writes the risk [N] of every sequence with `facts` of how they were found; the array's path.

    Raises:
        CheckpointError: a file cannot be written.
    """
    values, known_for = _files(stem)
    known_for.unlink(missing_ok=True)  # an older one must not vouch for new values
    with whole_file(values) as file:
        np.save(file, risks.astype(np.float64), allow_pickle=False)
    about = {"format": _FORMAT, "data": data.fingerprint, "sequences": len(data), **facts}
    write_atomically(known_for, json.dumps(about, indent=1) + "\n")
    return values


def read_risks(prefix: str | Path, stem: str | Path | None = None) -> np.ndarray:
    """The risk [N] float64 in [0, 1] of every sequence of a data set, memory-mapped.

    `stem` names the files with the risks; by default they lie beside the data.

    Raises:
        DataError: there are none, they were found for other data, or one is no risk.
    """
    data, mend = IndexedTokens(prefix), f"run `safereg score --data {prefix}` and choose a judge"
    own = (_FORMAT, data.fingerprint, len(data))
    values, known_for = _files(prefix if stem is None else stem)
    try:
        about = json.loads(known_for.read_text(encoding="utf-8"))
        risks = np.load(values, mmap_mode="r", allow_pickle=False)
        known = (about["format"], about["data"], about["sequences"])
    except FileNotFoundError as err:
        raise DataError(
            f"expected the risk of each sequence of {prefix} in {values} and {known_for.name}, "
            f"found no {Path(err.filename).name}: {mend}"
        ) from err
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(f"{values} or {known_for} cannot be read ({reason_of(err)}): {mend}") from (
            err
        )
    if known != own:
        raise DataError(
            f"{values} was written for other data than {prefix} is now ({known[2]} sequences, here "
            f"{own[2]}; SHA-256 {str(known[1])[:12]}, here {own[1][:12]}): {mend}"
        )
    if risks.shape != (len(data),) or risks.dtype != np.float64:
        raise DataError(
            f"{values}: expected {len(data)} numbers of float64, got {risks.dtype} of shape "
            f"{risks.shape}: {mend}"
        )
    bad = np.flatnonzero(~((risks >= 0) & (risks <= 1)))
    if bad.size:
        raise DataError(
            f"{values}: sequence {bad[0]} has risk {risks[bad[0]]}, expected a number in [0, 1]: "
            f"{mend}"
        )
    return risks


def _files(stem: str | Path) -> tuple[Path, Path]:
    return Path(f"{stem}.risk.npy"), Path(f"{stem}.risk.json")
