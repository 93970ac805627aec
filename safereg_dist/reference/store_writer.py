"""Building a stored reference: each rank writes shards, one writes the index and names the folder.

Everything lies in `OUT.partial` until the index is written and the folder becomes `OUT`, so a build
that ends early leaves nothing that could be taken for a store.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.reference.store import (
    INDEX_FILE,
    StoreIdentity,
    crc32_of,
    map_shard,
    sha256_of,
)
from safereg_dist.storage.signing import Key, write_signed

SHARD_BYTES = 1 << 30
"""Most bytes of states in one shard; while a store is built each rank holds up to two in memory."""
ROW_BYTES = 8 + 32 + 8
"""Of a row on disk beside its states: where it begins, its key and its checksum."""
WINDOW_PASSES = 32
"""Passes of the reference whose rows are sorted by length together while a store is built."""


class StoreSize(NamedTuple):
    """How much a store holds."""

    rows: int
    tokens: int
    num_bytes: int
    """Size of all files, the index included."""


class StoreWriter:
    """Writes one rank's shards into a folder, with one shard in memory."""

    def __init__(
        self, folder: Path, rank: int, *, shard_bytes: int = SHARD_BYTES, is_signed: bool = False
    ) -> None:
        """`is_signed` keeps a digest of each row's states, for an index that will be signed."""
        self._folder = folder
        self._rank = rank
        self._shard_bytes = shard_bytes
        self._is_signed = is_signed
        self._known: set[bytes] = set()
        self._states: dict[bytes, Tensor] = {}
        self._held_bytes = 0
        self._shards = 0

    def __len__(self) -> int:
        """Rows added so far."""
        return len(self._known)

    def holds(self, key: str) -> bool:
        """Whether a row with this key was already added."""
        return bytes.fromhex(key) in self._known

    def add(self, key: str, hidden: Tensor) -> None:
        """Adds the [t, H] states of a row, on the host; writes the shard once it is full.

        Raises:
            CheckpointError: the shard cannot be written.
        """
        if self.holds(key):
            return
        size = hidden.numel() * hidden.element_size()
        if self._states and self._held_bytes + size > self._shard_bytes:
            self.flush()
        self._known.add(bytes.fromhex(key))
        self._states[bytes.fromhex(key)] = hidden
        self._held_bytes += size

    def flush(self) -> None:
        """Writes the buffered rows, if any; call it after the last row.

        Raises:
            CheckpointError: the shard cannot be written.
        """
        if not self._states:
            return
        rows = list(self._states.values())
        ends = np.cumsum([0, *(len(states) for states in rows)])
        tensors = {
            "hidden": torch.cat(rows),
            "begin": torch.from_numpy(ends),
            "keys": torch.frombuffer(bytearray(b"".join(self._states)), dtype=torch.uint8),
            "crc32": torch.tensor([crc32_of(states) for states in rows], dtype=torch.int64),
        }
        tensors["keys"] = tensors["keys"].reshape(-1, 32)
        if self._is_signed:
            digests = bytearray(b"".join(map(sha256_of, rows)))
            tensors["sha256"] = torch.frombuffer(digests, dtype=torch.uint8).reshape(-1, 32)
        path = self._folder / f"rank{self._rank}-{self._shards:05d}.safetensors"
        try:
            save_file(tensors, path)
        except (OSError, SafetensorError) as err:
            raise _cannot_write(path, err) from err
        self._states, self._held_bytes = {}, 0
        self._shards += 1


def begin_store(out: Path) -> Path:
    """Makes the folder beside `out` in which all ranks write; replaces a leftover one.

    Raises:
        ConfigError: `out` exists.
        CheckpointError: the folder cannot be made.
    """
    require_absent(out)
    partial = partial_folder(out)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as err:
        raise _cannot_write(partial, err) from err
    return partial


def require_absent(out: Path) -> None:
    """Raises ConfigError where there is something at `out`."""
    if out.exists():
        raise ConfigError(
            f"--out {out} exists: remove it to build the reference's states again, or give "
            "another folder"
        )


def partial_folder(out: Path) -> Path:
    """Where a store is built before it becomes `out`."""
    return out.with_name(f"{out.name}.partial")


def finish_store(
    out: Path, identity: StoreIdentity, *, hidden_size: int, rows: int, key: Key | None = None
) -> StoreSize:
    """Writes the index of all ranks' shards and renames the folder to `out`.

    Args:
        rows: number of rows that the writers of all ranks hold together.
        key: signs the index.
    Raises:
        ConfigError: shards of some rank are not visible here.
        CheckpointError: the index cannot be written.
    """
    partial = partial_folder(out)
    shards = [map_shard(path) for path in sorted(partial.glob("rank*.safetensors"))]
    found = sum(len(shard.table.keys) for shard in shards)
    if found != rows:
        raise ConfigError(
            f"the ranks have written the states of {rows} rows, {partial} shows those of {found}: "
            "give an --out that all nodes see"
        )
    entries = [
        {"file": s.path.name, "bytes": s.path.stat().st_size, "sha256": s.table.digest()}
        for s in shards
    ]
    index = {"identity": asdict(identity), "hidden_size": hidden_size, "shards": entries}
    text = json.dumps(index, indent=2) + "\n"
    write_signed(partial / INDEX_FILE, text.encode(), key)
    try:
        partial.rename(out)
    except OSError as err:
        raise _cannot_write(out, err) from err
    tokens = sum(int(shard.table.begin[-1]) for shard in shards)
    return StoreSize(rows, tokens, sum(path.stat().st_size for path in out.iterdir()))


def _cannot_write(path: Path, err: Exception) -> CheckpointError:
    return CheckpointError(
        f"expected to write stored states to {path}, got: {err}: free disk space, or give an --out "
        "that can be written"
    )
