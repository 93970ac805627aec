"""Pooled hidden states on disk: a manifest, and shards of consecutive rows with all layers each.

Shards are the same for any number of ranks, and each appears whole or not at all, so a collection
that was killed resumes where it stopped, on any number of ranks. Reads return one layer at a time.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.probe_lab.rows import ProbedRow
from safereg_dist.risk.probe import width_of
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import parse_json

_MANIFEST = "manifest.json"
_ORDER = "order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that stored states depend on."""

    format: int = 1
    fingerprint: str
    """Fingerprint of the model's weights."""
    dtype: str
    template_sha256: str
    """Hash of the chat template."""
    rows_sha256: str
    """Hash of all tokens and spans, in order."""
    num_rows: int
    position: str
    poolings: tuple[str, ...]
    num_layers: int
    hidden_size: int
    rows_per_shard: int

    @property
    def key(self) -> str:
        """SHA-256 (hex) of all of it; each shard carries it."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    @property
    def num_shards(self) -> int:
        """Shards that a whole collection has."""
        return -(-self.num_rows // self.rows_per_shard)


def digest_rows(rows: Sequence[ProbedRow]) -> str:
    """SHA-256 (hex) of the tokens and spans of the rows."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(json.dumps([row.input_ids, row.first, row.last]).encode())
    return hasher.hexdigest()


class StateStore:
    """The states of one collection in a folder."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def prepare(self, *, replace_stale: bool) -> None:
        """Makes the folder, or checks that its content belongs to the same collection.

        Raises:
            ConfigError: the folder holds something else, or (unless `replace_stale`) states of
                another collection.
            CheckpointError: it cannot be written.
        """
        wanted = json.loads(json.dumps(asdict(self.manifest)))
        found = self._stored_manifest()
        if found is not None and found != wanted:
            differs = ", ".join(sorted(k for k in wanted if found.get(k) != wanted[k]))
            what = f"{self.folder} holds hidden states of another collection (differs: {differs})"
            if not replace_stale:
                raise ConfigError(f"{what}: delete the folder, or give another --work")
            print(f"{what}: collecting again", flush=True)
            shutil.rmtree(self.folder)
        write_atomically(self.folder / _MANIFEST, json.dumps(wanted, indent=2) + "\n")

    def _stored_manifest(self) -> dict | None:
        if not self.folder.exists():
            return None
        try:
            stored = parse_json((self.folder / _MANIFEST).read_bytes())
        except (OSError, ValueError):
            stored = None
        if isinstance(stored, dict):
            return stored
        if not self.folder.is_dir() or any(self.folder.iterdir()):
            raise ConfigError(
                f"expected hidden states or an empty folder at {self.folder}, found neither: give "
                "another --work"
            )
        return None

    def has_shard(self, shard: int) -> bool:
        """Whether the shard was written before."""
        return self._path(shard).is_file()

    def write_shard(self, shard: int, order: Sequence[int], states: dict[str, Tensor]) -> None:
        """Writes a shard, whole or not at all.

        Args:
            order: [n] row of each state.
            states: by pooling, [layers, n, H] on the host.
        """
        tensors = {**states, _ORDER: torch.tensor(list(order), dtype=torch.int64)}
        write_atomically(self._path(shard), save(tensors, metadata={"key": self.manifest.key}))

    def layer(self, pooling: str, layer: int) -> Tensor:
        """[rows, H] (or 2H) float32 states of one layer (1 to L), rows in the order given.

        Raises:
            CheckpointError: a shard is missing, torn, or of another collection.
        """
        features = self.manifest.hidden_size * width_of(pooling)
        states = torch.empty(self.manifest.num_rows, features)
        for shard in range(self.manifest.num_shards):
            path = self._path(shard)
            try:
                with safe_open(path, framework="pt") as file:
                    if (file.metadata() or {}).get("key") != self.manifest.key:
                        raise CheckpointError(
                            f"{path} is of another collection: delete {self.folder} and collect "
                            "again"
                        )
                    order = file.get_tensor(_ORDER)
                    states[order] = file.get_slice(pooling)[layer - 1].float()
            except (OSError, SafetensorError) as err:
                raise CheckpointError(
                    f"expected hidden states in {path}, got: {err}: delete the file and run the "
                    "same command again"
                ) from err
        return states

    def remove(self) -> None:
        """Deletes the folder with all states."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, shard: int) -> Path:
        return self.folder / f"states-{shard:05d}.safetensors"
