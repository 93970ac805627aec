"""Checkpoints of a run: what they hold, which there are, and how one is restored bit for bit.

checkpoint/step-00000100/
    state.json          step, moving average, positions of log files, world size, configuration
    rank0.safetensors   random states of rank 0 (one file per rank)
    risk0.safetensors   its risk cache, if it has one
    engine/             the engine's own checkpoint
    manifest.json       digests of all these files and of the logs, see `manifest`; written last

`save` writes them. On another number of ranks a run goes on with the same rows in every step
(`data.lanes`), the risks that all ranks knew, and new random states; its results are then not the
same bits.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter

from safereg_dist.config import Config
from safereg_dist.config.section import Section, changes_result, is_omitted, place_in
from safereg_dist.errors import CheckpointError, reason_of
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import PolicyEngine
from safereg_dist.run.random_states import load_random, new_random
from safereg_dist.step import SafetyRegularizer
from safereg_dist.storage.json_text import parse_json

_FORMAT = 3
UNCHECKED_FORMAT = 2
"""Has no manifest; format 1 had other names for the policy's weights too."""


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
    """Time until each of these was whole."""
    save_blocked_seconds: NonNegativeFloat | None = None
    """Of it, time in which no rank trained; None (of earlier versions) = all."""
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


def aside(final: Path, mark: str = "") -> Path:
    """Where a checkpoint is while it is not whole; see `remove_partial`."""
    return final.with_name(f".{final.name}{mark}.partial")


def saved_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written whole, oldest first; they may be damaged since.

    Somebody's copy beside them (`step-00000100-kept`) is none: old ones are removed.
    """
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdecimal())


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
            load_random(checkpoint / f"rank{ranks.rank}.safetensors", ranks.device)
        else:
            new_random(seed, state.step, ranks)


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
