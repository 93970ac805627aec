"""Checkpoints of a run: written aside, made visible by one rename, restored bit for bit.

checkpoint/step-00000100/
    state.json          step, moving average, positions of log files, world size, configuration
    rank0.safetensors   random states of rank 0 (one file per rank)
    risk0.safetensors   its risk cache, if it has one
    engine/             the engine's own checkpoint
    manifest.json       digests of all these files and of the logs, see `manifest`; written last

On another number of ranks a run goes on with the same rows in every step (`data.lanes`), the risks
that all ranks knew, and new random states; its results are then not the same bits.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from safereg_dist.config import Config
from safereg_dist.config.section import Section, changes_result, is_omitted, place_in
from safereg_dist.errors import CheckpointError, reason_of
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import PolicyEngine
from safereg_dist.run.manifest import Digests, Manifest, own_digests, write_manifest
from safereg_dist.run.signing import Key
from safereg_dist.step import SafetyRegularizer
from safereg_dist.storage.digests import FileDigest
from safereg_dist.storage.json_text import parse_json

_FORMAT = 3
UNCHECKED_FORMAT = 2
"""Has no manifest; format 1 had other names for the policy's weights too."""
_RESERVE_BYTES = 64 << 20
"""Free disk required beyond the size of a checkpoint, for logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The state of a run besides weights, optimizer, random states and risk cache."""

    step: NonNegativeInt
    """Optimizer steps done; the data position follows from it."""
    world_size: PositiveInt
    config_hash: str
    order_digest: str
    """`RowSources.order_digest`: the order of rows depends on it and the configuration."""
    non_finite_steps: NonNegativeInt
    """Total number of skipped steps."""
    non_finite_in_a_row: NonNegativeInt
    metrics_bytes: NonNegativeInt
    ledger_bytes: list[NonNegativeInt]
    """Position in each rank's ledger, and in those of ranks that are gone."""
    seconds: NonNegativeFloat
    """Training time so far."""
    regularizer: dict[str, Any] = field(default_factory=dict)
    """The state that `SafetyRegularizer.save_state` returned."""
    frozen: str = ""
    """With `lora.frozen`: the fingerprint of the base model with these adapters."""
    damaged_checkpoints: NonNegativeInt = 0
    """Checkpoints that this run could not go on from."""
    saves: NonNegativeInt = 0
    """Checkpoints written before this one."""
    save_seconds: NonNegativeFloat = 0.0
    """Time that these took, in which no rank trained."""
    began_with: NonNegativeInt = 0
    """Ranks of the run at its first step; 0 (of earlier versions) = `world_size`."""
    held_back: NonNegativeFloat | None = None
    """Share of rows counted before the first step that are held back; None = not counted."""
    format: int = _FORMAT

    __pydantic_config__ = ConfigDict(extra="forbid")


_STATE = TypeAdapter(RunState)


def config_hash(config: Config, *, below: Path | None = None) -> str:
    """SHA-256 (hex) of all keys but output paths, saving and time limits, which change no result.

    Args:
        below: paths below this folder are taken relative to it.
    """
    values = _determining(config, below=below)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_hash_of(hashed: str, config: Config) -> bool:
    """True where a run that wrote this hash had this configuration.

    Version 0.1 hashed paths as they were written, so mostly relative to the working folder.
    """
    return hashed in (config_hash(config), config_hash(config, below=Path.cwd()))


def differences(before: Config, now: Config) -> list[str]:
    """The keys that `config_hash` reads and that differ, each with both values."""
    old, new = (dict(_flat(_determining(c, omits=False))) for c in (before, now))
    return [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _determining(
    value: Any, *, omits: bool = True, below: Path | None = None, is_path: bool = False
) -> Any:
    """A value of the configuration, sections as dicts without the keys marked as `ASIDE`.

    `omits` leaves out those marked as `NEWER` at their default too.
    """
    if isinstance(value, tuple):
        return [_determining(each, omits=omits, below=below, is_path=is_path) for each in value]
    if isinstance(value, str) and is_path and below is not None:
        return os.path.relpath(value, below) if value.startswith(f"{below}{os.sep}") else value
    if isinstance(value, dict):
        return {k: _determining(v, below=below, is_path=is_path) for k, v in value.items()}
    if not isinstance(value, Section):
        return value
    return {
        key: _determining(
            getattr(value, key), omits=omits, below=below, is_path=place_in(field) is not None
        )
        for key, field in type(value).model_fields.items()
        if changes_result(field) and not (omits and is_omitted(field, getattr(value, key)))
    }


def save_checkpoint(
    folder: Path,
    state: RunState,
    *,
    engine: PolicyEngine,
    regularizer: SafetyRegularizer,
    ranks: Ranks,
    keep: int,
    logs: Digests | None = None,
    key: Key | None = None,
) -> None:
    """Writes one checkpoint below `folder` and removes all but the newest `keep`.

    `logs` are the digests of this rank's logs up to here; `key` signs, on rank 0.

    Raises:
        CheckpointError: the disk is too small; earlier checkpoints stay as they are.
    Collectives: the engine's own, and six gathers of texts.
    """
    final = folder / f"step-{state.step:08d}"
    partial = _aside(final)
    with ranks.together():
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            _require_disk(folder, _checkpoint_bytes(regularizer, folder))
            partial.mkdir(parents=True)
    with _clear_errors(partial):
        engine.save(partial / "engine")
    with ranks.together(), _clear_errors(partial):
        _save_random(partial / f"rank{ranks.rank}.safetensors", ranks.device)
        small = regularizer.save_state(partial / f"risk{ranks.rank}.safetensors")
        if ranks.is_main:
            _write_json(partial / "state.json", asdict(replace(state, regularizer=small)))
    with ranks.together(), _clear_errors(partial):  # all have written: no file comes or goes
        own = own_digests(partial, ranks.rank, ranks.world_size)
    files, all_logs = (_of_all_ranks(digests, ranks) for digests in (own, logs or {}))
    with ranks.together(), _clear_errors(partial):
        if ranks.is_main:
            write_manifest(partial, Manifest(state.step, files, all_logs), key)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _sync_folder(folder)  # before an older one goes
            for old in saved_checkpoints(folder)[:-keep]:
                # Renamed first: what a kill leaves of it, the next start removes.
                os.replace(old, _aside(old))
                shutil.rmtree(_aside(old))


def _of_all_ranks(own: Digests, ranks: Ranks) -> Digests:
    """All ranks' digests, on every rank. Collectives: one gather of texts."""
    return {
        name: FileDigest(*digest)
        for text in ranks.gather_texts(json.dumps(own))
        for name, digest in json.loads(text).items()
    }


def _aside(final: Path) -> Path:
    """Where a checkpoint is while it is not whole; see `remove_partial`."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def _clear_errors(partial: Path) -> Iterator[None]:
    """A block whose write errors become CheckpointError; removes partial files then."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as err:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"expected to write a checkpoint to {partial.parent}, got: {err}: free disk space and "
            "run the same command again; it resumes from the newest checkpoint"
        ) from err


def saved_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written whole, oldest first; they may be damaged since."""
    return sorted(folder.glob("step-*"))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial(folder: Path) -> None:
    """Removes what a killed save left behind."""
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(
    checkpoint: Path,
    state: RunState,
    *,
    seed: int,
    engine: PolicyEngine,
    regularizer: SafetyRegularizer,
    ranks: Ranks,
    order_digest: str,
    frozen: str = "",
) -> None:
    """Restores engine, random states, moving average and risk cache; `find_checkpoint` found it.

    On another number of ranks the random states begin anew, from `seed` and the step.

    Raises:
        CheckpointError: written with another order of rows, or beside other weights in
            `lora.frozen`.
    Collectives: the engine's own, and two gathers of texts.
    """
    with ranks.together():
        if state.order_digest != order_digest:
            raise CheckpointError(
                f"the rows that are dealt as risky are not those of {checkpoint}: the order would "
                "change in the middle (reference.balance); put the risk column and risk.override "
                "back, or choose another output_dir"
            )
        if state.frozen != frozen:
            raise CheckpointError(
                f"the base model or an adapter of lora.frozen has changed since {checkpoint} was "
                f"written (fingerprint {state.frozen[:12]}, now {frozen[:12]}): put it back, or "
                "choose another output_dir"
            )
    engine.load(checkpoint / "engine")
    with ranks.together():
        risks = [checkpoint / f"risk{rank}.safetensors" for rank in range(state.world_size)]
        is_same = state.world_size == ranks.world_size
        regularizer.load_state(risks[ranks.rank] if is_same else risks, state.regularizer)
        # Last, so that nothing draws from a generator between this and training.
        if is_same:
            _load_random(checkpoint / f"rank{ranks.rank}.safetensors", ranks.device)
        else:
            _new_random(seed, state.step, ranks)


def read_state(checkpoint: Path) -> RunState:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: unreadable, or of another format.
    """
    try:
        text = (checkpoint / "state.json").read_bytes()
        written = parse_json(text).get("format", 1)
        if written not in (_FORMAT, UNCHECKED_FORMAT):
            raise CheckpointError(
                f"{checkpoint} has format {written}, this version of safereg_dist reads "
                f"{UNCHECKED_FORMAT} and {_FORMAT}: go on with the version that wrote it, or "
                "choose another output_dir"
            )
        return _STATE.validate_json(text, strict=True)
    except (OSError, ValueError, AttributeError) as err:
        raise CheckpointError(
            f"{checkpoint}/state.json cannot be read ({reason_of(err)}): restore it from a copy"
        ) from err


def require_same_run(checkpoint: Path, state: RunState, config: Config) -> None:
    """Returns where a checkpoint is of this configuration.

    Raises:
        CheckpointError: it is not.
    """
    if not is_hash_of(state.config_hash, config):
        raise CheckpointError(
            f"{checkpoint} was written by another configuration, or by an earlier version of "
            "safereg: resume with the same ones, or choose another output_dir"
        )


def _checkpoint_bytes(regularizer: SafetyRegularizer, folder: Path) -> int:
    """Bytes of a checkpoint: the size of the last one, else 16 per parameter."""
    written = saved_checkpoints(folder)
    if written:
        return sum(f.stat().st_size for f in written[-1].rglob("*") if f.is_file())
    return 16 * sum(
        getattr(p, "ds_numel", p.numel()) for p in regularizer.policy.model.parameters()
    )


def _require_disk(folder: Path, needed: int) -> None:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _RESERVE_BYTES:
        raise CheckpointError(
            f"expected {(needed + _RESERVE_BYTES) / 1e9:.2f} GB free in {existing} for a "
            f"checkpoint, found {free / 1e9:.2f} GB: free some space, lower "
            "train.keep_checkpoints, or move output_dir"
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _save_random(path: Path, device: torch.device) -> None:
    _, words, _ = random.getstate()  # drops the pending gauss() value: it is never used here
    numpy_state = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_pos": torch.tensor([numpy_state["state"]["pos"]]),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    save_file(tensors, path)


def _load_random(path: Path, device: torch.device) -> None:
    tensors = load_file(path)
    torch.set_rng_state(tensors["torch"])
    random.setstate((3, tuple(tensors["python"].tolist()), None))
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, int(tensors["numpy_pos"][0]), 0, 0.0))
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _new_random(seed: int, step: int, ranks: Ranks) -> None:
    """Generators for a number of ranks that wrote no states: they follow from seed, step, rank."""
    drawn = np.random.SeedSequence([seed, step, ranks.world_size, ranks.rank]).generate_state(3)
    own, python, numpy = (int(number) for number in drawn)
    torch.manual_seed(own)  # of the device too
    random.seed(python)
    np.random.seed(numpy)
