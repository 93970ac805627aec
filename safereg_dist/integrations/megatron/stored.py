"""Reference states that a rank of the last stage has stored: a line is run once, then read.

One file for each line of tokens, below a folder of the rank's place in its head: a line's states
[S_own, H] are those of this layout, and their SHA-256 is beside them. The files of the owner come
last, a step after all others, so that a line that the owner has stored is stored on every rank of
its head.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.megatron import Layout
from safereg_dist.reference.store import sha256_of
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.types import MicroBatch

KEY_BYTES = 32
NO_LINE = bytes(KEY_BYTES)
"""In place of a key: the line needs no states."""
_FORMAT = 1


class StoredStates:
    """The files of one rank."""

    def __init__(self, folder: Path, layout: Layout, *, identity: str, is_spread: bool) -> None:
        """Raises ConfigError where the folder holds states of something else."""
        tp, cp = layout.tp_group.size(), layout.cp_group.size()
        self._folder = folder / f"tp{layout.tp_rank}-cp{layout.cp_group.rank()}"
        self._later: list[tuple[str, Tensor]] = []
        self._is_owner = layout.is_owner
        facts = {
            "format": _FORMAT,
            "reference": identity,
            "layout": f"tensor {tp}, context {cp}, sequence parallelism {is_spread}",
        }
        text = json.dumps(facts, indent=2) + "\n"
        path = self._folder / "identity.json"
        if not path.is_file():
            write_atomically(path, text)
        found = path.read_text("utf-8")
        if found != text:
            raise ConfigError(
                f"expected states of {facts} in reference.cache={folder}, got {found.strip()}: "
                "give another folder, or remove this one"
            )

    def holds(self, key: bytes) -> bool:
        """Whether the line with this key is stored."""
        return self._path(key.hex()).is_file()

    def read(self, key: bytes) -> Tensor:
        """[S_own, H] of a line, on the host.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = self._path(key.hex())
        try:
            with safe_open(path, framework="pt") as file:
                states, facts = file.get_tensor("states"), file.metadata() or {}
            # Files of version 0.1 have no digest.
            if facts.get("sha256", digest := sha256_of(states).hex()) != digest:
                raise ValueError("another SHA-256 than was written")
            return states
        except (OSError, ValueError, SafetensorError) as err:
            raise CheckpointError(
                f"expected the reference's states of a line in {path}, got {err}: remove "
                f"{path.parents[2]}, the states are computed again"
            ) from err

    def write(self, key: bytes, states: Tensor) -> None:
        """Stores a line's states; the owner's only with the next `flush`."""
        self._later.append((key.hex(), states.detach().cpu().contiguous()))
        if not self._is_owner:
            self.flush()

    def flush(self) -> None:
        """Writes what waits. Raises CheckpointError where the disk is full."""
        for name, states in self._later:
            facts = {"sha256": sha256_of(states).hex()}
            write_atomically(self._path(name), save({"states": states}, facts))
        self._later = []

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.safetensors"


def reference_identity(chunks: Sequence[nn.Module], world: Ranks) -> str:
    """Hash of the reference's weights over all ranks. Collectives: a gather of 32 bytes."""
    own = hashlib.sha256("".join(model_fingerprint(chunk) for chunk in chunks).encode()).digest()
    sent = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(world.device)
    found = {bytes(row) for row in world.gather(sent).cpu().numpy()}
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()


def line_keys(batch: MicroBatch, active: Iterable[int]) -> list[bytes]:
    """[B] a key of the tokens and positions of each line with one of these rows; else `NO_LINE`."""
    lines, width = batch.input_ids.shape
    wanted = {batch.row_begins[row] // width for row in active}
    return [_key(batch, line) if line in wanted else NO_LINE for line in range(lines)]


def _key(batch: MicroBatch, line: int) -> bytes:
    hasher = hashlib.sha256(batch.input_ids[line].numpy().tobytes())
    if batch.position_ids is not None:
        hasher.update(batch.position_ids[line].numpy().tobytes())
    return hasher.digest()


def packed_keys(keys: Sequence[Sequence[bytes]], count: int, lines: int) -> Tensor:
    """[count, lines, 32] uint8; zeros where none are given."""
    found = torch.zeros(count, lines, KEY_BYTES, dtype=torch.uint8)
    for place, own in enumerate(keys):
        for line, key in enumerate(own):
            found[place, line] = torch.frombuffer(bytearray(key), dtype=torch.uint8)
    return found


def unpacked_keys(packed: Tensor) -> list[dict[int, bytes]]:
    """Of each micro-batch line -> key, of the lines that have one."""
    found = [[bytes(key.numpy()) for key in own] for own in packed.cpu()]
    return [{line: key for line, key in enumerate(own) if key != NO_LINE} for own in found]
