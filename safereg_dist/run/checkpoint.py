"""Checkpoints of a run: written aside, made visible by one rename, restored bit for bit.

checkpoint/step-00000100/
    state.json          step, moving average, positions of log files, world size, configuration
    rank0.safetensors   random states of rank 0 (one file per rank)
    risk0.safetensors   its risk cache, if it has one
    engine/             the engine's own checkpoint
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
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from safereg_dist.config import Config
from safereg_dist.config.section import Section, changes_result, is_omitted
from safereg_dist.errors import CheckpointError, reason_of
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import PolicyEngine
from safereg_dist.step import SafetyRegularizer
from safereg_dist.storage.json_text import parse_json

_FORMAT = 2  # format 1 (safereg_dist 0.1) had other names for the policy's weights
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
    """Position in each rank's ledger."""
    seconds: NonNegativeFloat
    """Training time so far."""
    regularizer: dict[str, float | None] = field(default_factory=dict)
    """The state that `SafetyRegularizer.save_state` returned."""
    frozen: str = ""
    """With `lora.frozen`: the fingerprint of the base model with these adapters."""
    format: int = _FORMAT


def config_hash(config: Config) -> str:
    """SHA-256 (hex) of all keys but paths, saving and time limits, which do not change results."""
    return hashlib.sha256(json.dumps(_determining(config), sort_keys=True).encode()).hexdigest()


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


def _determining(value: Any, *, omits: bool = True) -> Any:
    """A value of the configuration, sections as dicts without the keys marked as `ASIDE`.

    `omits` leaves out those marked as `NEWER` at their default too.
    """
    if isinstance(value, tuple):
        return [_determining(each, omits=omits) for each in value]
    if not isinstance(value, Section):
        return value
    return {
        key: _determining(getattr(value, key), omits=omits)
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
) -> None:
    """Writes one checkpoint below `folder` and removes all but the newest `keep`.

    Raises:
        CheckpointError: the disk is too small; earlier checkpoints stay as they are.
    Collectives: the engine's own, and two gathers of texts.
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
    with ranks.together(), _clear_errors(partial):
        if ranks.is_main:
            _write_json(partial / "state.json", asdict(replace(state, regularizer=small)))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in complete_checkpoints(folder)[:-keep]:
                # Renamed first: what a kill leaves of it, the next start removes.
                os.replace(old, _aside(old))
                shutil.rmtree(_aside(old))


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


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written whole, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def remove_partial(folder: Path) -> None:
    """Removes what a killed save left behind."""
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(
    checkpoint: Path,
    *,
    config: Config,
    engine: PolicyEngine,
    regularizer: SafetyRegularizer,
    ranks: Ranks,
    order_digest: str,
    frozen: str = "",
) -> RunState:
    """Restores engine, random states, moving average and risk cache.

    Raises:
        CheckpointError: written by another configuration, number of ranks or order of rows, or
            beside other weights in `lora.frozen`.
    Collectives: the engine's own, and two gathers of texts.
    """
    with ranks.together():
        state = read_state(checkpoint)
        _require_same_run(checkpoint, state, config=config, world_size=ranks.world_size)
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
        regularizer.load_state(checkpoint / f"risk{ranks.rank}.safetensors", state.regularizer)
        # Last, so that nothing draws from a generator between this and training.
        _load_random(checkpoint / f"rank{ranks.rank}.safetensors", ranks.device)
    return state


def read_state(checkpoint: Path) -> RunState:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: unreadable, or of another format.
    """
    try:
        text = (checkpoint / "state.json").read_bytes()
        written = parse_json(text).get("format", 1)
        if written != _FORMAT:
            raise CheckpointError(
                f"{checkpoint} has format {written}, this version of safereg_dist reads {_FORMAT}: "
                "go on with the version that wrote it, or choose another output_dir"
            )
        return TypeAdapter(RunState).validate_json(text, strict=True)
    except (OSError, ValueError, TypeError, AttributeError) as err:
        raise CheckpointError(
            f"{checkpoint}/state.json cannot be read ({reason_of(err)}): remove this checkpoint to "
            "resume from an earlier one"
        ) from err


def _require_same_run(
    checkpoint: Path, state: RunState, *, config: Config, world_size: int
) -> None:
    if state.config_hash != config_hash(config):
        raise CheckpointError(
            f"{checkpoint} was written by another configuration, or by an earlier version of "
            "safereg: resume with the same ones, or choose another output_dir"
        )
    if state.world_size != world_size:
        raise CheckpointError(
            f"{checkpoint} was written by {state.world_size} ranks, this run has {world_size}: "
            f"resume with {state.world_size} ranks (optimizer shards, random states and the "
            "assignment of rows belong to a number of ranks)"
        )


def _checkpoint_bytes(regularizer: SafetyRegularizer, folder: Path) -> int:
    """Bytes of a checkpoint: the size of the last one, else 16 per parameter."""
    written = complete_checkpoints(folder)
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
