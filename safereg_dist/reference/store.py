"""The stored reference: final hidden states of response tokens, computed once and memory-mapped.

Text and reference are frozen, so the states never change. A store is a folder of shards,

    hidden   [T, H]      bf16 or float32, states that predict the response tokens, row after row
    begin    [n + 1]     int64, where the states of each of n rows begin; the last entry is T
    keys     [n, 32]     uint8, the rows' names (`fingerprint.row_key`)
    crc32    [n]         int64, of the bytes of each row's states
    sha256   [n, 32]     uint8, of the same bytes, where the store is signed

and of `index.json`, written last: what the states depend on, and size of every shard and digest of
its table. With `signing` it has a signature beside it, `index.json.sig`.
Every rank writes shards of its own and reads those of all, so any number of ranks can read.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from safereg_dist.errors import CheckpointError, ConfigError, reason_of
from safereg_dist.models.fingerprint import tokenizer_fingerprint
from safereg_dist.storage.json_text import parse_json
from safereg_dist.storage.signing import Key, what_is_wrong

INDEX_FILE = "index.json"
_FORMAT = 1
_REMEDIES = {
    "reference": "put the weights of reference.model (or model) back, ",
    "tokenizer": "put the tokenizer and its chat template back, ",
    "data": "put data.train and data.anchor back (a new risk column makes another file), or their "
    "data.max_length and data.overlong, ",
    "precision": "set train.precision to what it was built with, ",
    "format": "",
}
_BUILD = "build it again with `safereg reference build CONFIG --out DIR`"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIdentity:
    """Everything that stored states depend on; states of another identity are refused."""

    reference: str
    """Fingerprint of the reference's weights."""
    tokenizer: str
    """Fingerprint of the tokenizer and its chat template."""
    data: tuple[str, ...]
    """Content hashes of the training rows and, where there are any, the anchor rows."""
    precision: str
    """`bf16` or `fp32`: the precision of the reference and of the stored states."""
    format: int = _FORMAT

    @classmethod
    def of(
        cls,
        reference: str,
        tokenizer: PreTrainedTokenizerBase,
        content_hashes: Iterable[str],
        *,
        precision: str,
    ) -> "StoreIdentity":
        """The identity for a run, from its reference, tokenizer, data and precision."""
        return cls(
            reference=reference,
            tokenizer=tokenizer_fingerprint(tokenizer),
            data=tuple(content_hashes),
            precision=precision,
        )


class ReferenceStore:
    """Stored states of rows, looked up by `fingerprint.row_key` and read on demand."""

    def __init__(self, shards: Sequence["Shard"], hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self._shards = list(shards)
        tables = [shard.table for shard in self._shards]
        keys = [table.keys for table in tables] or [np.empty(0, dtype="S32")]
        # A row that two ranks had to store is there twice, with the same states: one is enough.
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        places = [table.places(i) for i, table in enumerate(tables)] or [np.empty((0, 4), int)]
        self._places = np.concatenate(places)[first]

    @classmethod
    def open(
        cls, folder: Path, expected: StoreIdentity, *, index: str | None = None
    ) -> "ReferenceStore":
        """The store in a folder.

        Args:
            index: what `read_index` has returned, on rank 0; by default it is read without a key.
        Raises:
            ConfigError: the folder is no store, is damaged, or holds states of something else than
                `expected`.
        Collectives: none.
        """
        found = _parsed(folder, read_index(folder, None) if index is None else index)
        _require_same(folder, found.identity, expected)
        shards = [_open_shard(folder, entry, found.hidden_size) for entry in found.shards]
        return cls(shards, found.hidden_size)

    def __len__(self) -> int:
        """Number of distinct rows."""
        return len(self._keys)

    def holds(self, key: str) -> bool:
        """Whether the states of the row with this key are stored."""
        return self._find(key) is not None

    def read(self, key: str) -> Tensor:
        """[t, H] states that predict the row's response tokens, on the host, mapped from the file.

        Raises:
            KeyError: they are not stored.
            CheckpointError: they are not what was written.
        """
        row = self._find(key)
        if row is None:
            raise KeyError(f"no states are stored of row {key}")
        number, begin, end, place = self._places[row].tolist()
        shard = self._shards[number]
        states = shard.hidden[begin:end]
        if not shard.table.holds(place, states):
            raise CheckpointError(
                f"the states of a row in {shard.path} are not those that were written: {_BUILD}"
            )
        return states

    def _find(self, key: str) -> int | None:
        name = bytes.fromhex(key)
        at = int(np.searchsorted(self._keys, np.bytes_(name)))
        # As bytes of the array: numpy's own items lose zeros at their end.
        return at if self._keys[at : at + 1].tobytes() == name else None


class Table(NamedTuple):
    """A shard's table of its n rows."""

    keys: np.ndarray
    """[n] names, 32 bytes each."""
    begin: np.ndarray
    """[n + 1] first token of each row, and the number of tokens."""
    crc32: np.ndarray
    """[n] checksum of each row's states."""
    sha256: np.ndarray | None = None
    """[n, 32] digest of each row's states; None in a store without a signature."""

    def places(self, shard: int) -> np.ndarray:
        """[n, 4] shard, first and one past the last token, place in the shard of every row."""
        rows = np.arange(len(self.crc32))
        return np.stack([np.full_like(rows, shard), self.begin[:-1], self.begin[1:], rows], axis=1)

    def holds(self, place: int, states: Tensor) -> bool:
        """Whether these are the states of the row at this place."""
        if self.sha256 is None:
            return crc32_of(states) == self.crc32[place]
        return sha256_of(states) == self.sha256[place].tobytes()

    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        parts = (part.tobytes() for part in self if part is not None)
        return hashlib.sha256(b"".join(parts)).hexdigest()


class Shard(NamedTuple):
    """One file, mapped."""

    path: Path
    hidden: Any
    """[T, H]; a slice of it reads those rows alone."""
    table: Table


class _Entry(NamedTuple):
    """A shard's entry in the index."""

    file: str
    num_bytes: int
    sha256: str
    """SHA-256 (hex) of its table."""


class _Index(NamedTuple):
    identity: dict[str, Any]
    hidden_size: int
    shards: list[_Entry]


def read_index(folder: Path, key: Key | None) -> str:
    """The text of a store's index, which is signed with the key where one is given.

    Raises:
        ConfigError: it cannot be read, or is not signed with the key.
    """
    path = folder / INDEX_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError as err:
        raise ConfigError(
            f"expected a stored reference at reference.cache={folder}, found no {INDEX_FILE} in "
            f"it: check the path, or {_BUILD}"
        ) from err
    except OSError as err:
        raise _no_store(folder, err) from err
    wrong = None if key is None else what_is_wrong(path, content, key)
    if wrong:
        raise ConfigError(f"{wrong}: {_BUILD} and the same `signing`, or set signing=null")
    return content.decode("utf-8", "replace")


def _parsed(folder: Path, text: str) -> _Index:
    try:
        raw = parse_json(text)
        shards = [_Entry(e["file"], e["bytes"], e["sha256"]) for e in raw["shards"]]
        return _Index(dict(raw["identity"]), int(raw["hidden_size"]), shards)
    except (ValueError, KeyError, TypeError) as err:
        raise _no_store(folder, err) from err


def _no_store(folder: Path, err: Exception) -> ConfigError:
    return ConfigError(
        f"expected a stored reference at reference.cache={folder}, got {type(err).__name__}: "
        f"{reason_of(err, 200)}: check the path, or {_BUILD}"
    )


def _require_same(folder: Path, found: dict[str, Any], expected: StoreIdentity) -> None:
    wanted = json.loads(json.dumps(asdict(expected)))
    for field in fields(expected):
        got = found.get(field.name)
        if got != wanted[field.name]:
            raise ConfigError(
                f"the states in reference.cache={folder} belong to another {field.name}: expected "
                f"{_short(wanted[field.name])}, got {_short(got)}: {_REMEDIES[field.name]}"
                f"{_BUILD}, or set reference.cache=null"
            )


def _short(identity: Any) -> str:
    """A shortened fingerprint, or several, for messages."""
    parts = identity if isinstance(identity, list) else [identity]
    return " and ".join(str(part)[:12] for part in parts)


def _open_shard(folder: Path, entry: _Entry, hidden_size: int) -> Shard:
    path = folder / entry.file
    try:
        num_bytes = path.stat().st_size
        if num_bytes != entry.num_bytes:
            raise ConfigError(
                f"{path} has {num_bytes} bytes, its index says {entry.num_bytes}: {_BUILD}"
            )
        shard = map_shard(path)
    except (OSError, SafetensorError) as err:
        raise ConfigError(f"{path} of a stored reference cannot be read ({err}): {_BUILD}") from err
    shape = [int(shard.table.begin[-1]), hidden_size]
    if shard.table.digest() != entry.sha256 or shard.hidden.get_shape() != shape:
        raise ConfigError(f"{path} is not the file that its index describes: {_BUILD}")
    return shard


def map_shard(path: Path) -> Shard:
    """Opens a shard: reads its table and maps its states.

    Raises:
        OSError, SafetensorError: the file is missing or no shard.
    """
    file = safe_open(path, framework="pt")
    keys, begin, crc32 = (file.get_tensor(name).numpy() for name in ("keys", "begin", "crc32"))
    sha256 = file.get_tensor("sha256").numpy() if "sha256" in set(file.keys()) else None
    names = np.frombuffer(keys.tobytes(), dtype="S32")
    return Shard(path, file.get_slice("hidden"), Table(names, begin, crc32, sha256))


def crc32_of(states: Tensor) -> int:
    """CRC-32 of the bytes of [t, H] states."""
    return zlib.crc32(_bytes_of(states))


def sha256_of(states: Tensor) -> bytes:
    """SHA-256 of the bytes of [t, H] states: unlike a CRC-32 nobody finds others with the same."""
    return hashlib.sha256(_bytes_of(states)).digest()


def _bytes_of(states: Tensor) -> memoryview:
    return states.contiguous().view(torch.uint8).numpy().data
