"""Which checkpoint a run goes on from: the newest that is whole, or the one that was asked for.

Rank 0 alone lists them and says which is looked at; every rank checks the files that it will read,
and all agree, before anything is loaded. What is damaged is named, and the one before it is looked
at. Nothing is removed: a checkpoint that a run went back behind is renamed.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safereg_dist.config import Config
from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.pickles import check_file
from safereg_dist.run.checkpoint import (
    UNCHECKED_FORMAT,
    RunState,
    read_state,
    require_same_run,
    saved_checkpoints,
)
from safereg_dist.run.ledger import rank_path, reopen_ledger
from safereg_dist.run.manifest import (
    Manifest,
    files_below,
    files_of_rank,
    first_changed,
    first_changed_log,
    read_manifest,
)
from safereg_dist.run.metrics import METRICS_NAME
from safereg_dist.storage.signing import Key, signing_key


class Found(NamedTuple):
    """A checkpoint to go on from, whole on all ranks."""

    path: Path
    state: RunState
    damaged: int
    """Newer ones that were damaged."""

    @property
    def began_with(self) -> int:
        """Ranks of the run at its first step."""
        return self.state.began_with or self.state.world_size


def find_checkpoint(config: Config, ranks: Ranks) -> Found | None:
    """The checkpoint that `train.resume` says; None where the run begins.

    Raises:
        CheckpointError: there are checkpoints, and none can be used, or the one asked for cannot;
            or it is of another run.
        ConfigError: the key of `signing` is missing.
    Collectives: two broadcasts and a few gathers of texts for each checkpoint looked at.
    """
    candidates, key = [], None
    with ranks.together():
        if ranks.is_main:
            key = signing_key(config.signing)
            candidates = [str(path) for path in _candidates(config)]
    candidates = [Path(name) for name in json.loads(ranks.from_main(json.dumps(candidates)))]
    damage = []
    for path in candidates:
        found = _looked_at(path, config, key, ranks)
        if isinstance(found, RunState):
            return Found(path, found, len(damage))
        damage.append(f"checkpoint {path} cannot be used: {found}")
        if ranks.is_main and path != candidates[-1]:
            print(f"{damage[-1]}: the one before it is used", flush=True)
    if damage:
        raise CheckpointError(
            f"{damage[-1]}; {_no_other(config, len(damage))}: restore it, or choose another "
            "output_dir to start anew"
        )
    return None


def _no_other(config: Config, count: int) -> str:
    if config.train.resume != "latest":
        return f"it is the one that train.resume={config.train.resume} asks for"
    return "there is no other" if count == 1 else f"none of {count} can be used"


def set_aside_newer(folder: Path, step: int) -> None:
    """Renames the checkpoints after `step`, which the run goes back behind: `unused-step-...`.

    Raises:
        CheckpointError: they cannot be renamed.
    """
    try:
        for path in saved_checkpoints(folder):
            if path.name > f"step-{step:08d}":
                free = (folder / f"unused-{n}-{path.name}" for n in range(1, 1000))
                os.replace(path, next(name for name in free if not name.exists()))
    except OSError as err:
        raise CheckpointError(f"cannot rename a checkpoint in {folder}: {err.strerror}") from err


def _candidates(config: Config) -> list[Path]:
    """The checkpoints to look at, the best first."""
    folder, wanted = Path(config.output_dir, "checkpoint"), config.train.resume
    saved = saved_checkpoints(folder)[::-1]
    if wanted == "latest":
        return saved
    if wanted == "never":
        if saved:
            raise CheckpointError(
                f"train.resume=never, but {folder} holds {saved[0].name}: choose another "
                "output_dir, or resume=latest to go on"
            )
        return []
    path = folder / f"step-{int(wanted):08d}" if wanted.isdecimal() else Path(wanted)
    if not path.is_dir():
        names = ", ".join(p.name for p in saved) or "none"
        raise CheckpointError(
            f"train.resume={wanted} asks for {path}, which is no folder; {folder} holds {names}: "
            "name one of them, or latest or never"
        )
    return [path]


def _looked_at(path: Path, config: Config, key: Key | None, ranks: Ranks) -> RunState | str:
    """The state of a whole checkpoint of this run, or what is wrong with it; equal on all ranks."""
    manifest = agreed_manifest(lambda: _manifest(path, key), ranks)
    if isinstance(manifest, str):
        return manifest
    own = _checked(path, manifest, ranks)
    if wrong := first_found(own if isinstance(own, str) else None, ranks):
        return wrong
    assert isinstance(own, RunState)  # else all ranks had returned
    state = own
    with ranks.together():
        require_same_run(path, state, config)
    if manifest is None:
        return state
    with ranks.together():
        if ranks.is_main:
            reopen_ledger(config.output_dir)  # where the run was killed before its summary
    wrong = _changed_log(Path(config.output_dir), manifest, state, ranks)
    return first_found(wrong, ranks) or state


def agreed_manifest(read: Callable[[], Manifest | None], ranks: Ranks) -> Manifest | str | None:
    """What rank 0 reads, on all ranks: a manifest, none, or what is wrong with it as a text.

    Collectives: one broadcast.
    """
    text, wrong = "", ""
    if ranks.is_main:
        try:
            found = read()
            text = "" if found is None else found.to_bytes().decode()
        except (ValueError, OSError, CheckpointError) as err:
            wrong = str(err)
    text, wrong = json.loads(ranks.from_main(json.dumps([text, wrong])))
    return wrong or (Manifest.from_bytes(text.encode()) if text else None)


def _manifest(path: Path, key: Key | None) -> Manifest | None:
    """None for a checkpoint of the format that had none, without a key."""
    if key is None and not (path / "manifest.json").exists():
        if read_state(path).format == UNCHECKED_FORMAT:
            print(
                f"{path} has format {UNCHECKED_FORMAT}, which had no manifest: damage to it cannot "
                "be found",
                flush=True,
            )
            return None
    return read_manifest(path, key)


def _checked(path: Path, manifest: Manifest | None, ranks: Ranks) -> RunState | str:
    """The state, or what is wrong with a file that this rank reads; nothing of it is run."""
    names = files_of_rank(
        files_below(path) if manifest is None else manifest.files, ranks.rank, ranks.world_size
    )
    changed = manifest and first_changed(path, manifest.files, names)
    if changed:
        return changed
    try:
        for name in names:
            check_file(path / name)
        return read_state(path)
    except (OSError, CheckpointError) as err:
        return str(err)


def _changed_log(folder: Path, manifest: Manifest, state: RunState, ranks: Ranks) -> str | None:
    """What is wrong with this rank's logs up to the checkpoint."""
    expected = {METRICS_NAME: state.metrics_bytes}
    for rank, length in enumerate(state.ledger_bytes):
        expected[rank_path("", rank).name] = length
    if {name: digest.bytes for name, digest in manifest.logs.items()} != expected:
        return "its manifest and its state do not agree on the logs"
    names = files_of_rank(manifest.logs, ranks.rank, ranks.world_size)
    return first_changed_log(folder, manifest.logs, names)


def first_found(own: str | None, ranks: Ranks) -> str | None:
    """The first rank's finding, on all ranks. Collectives: one gather of texts."""
    found = ((rank, text) for rank, text in enumerate(ranks.gather_texts(own or "")) if text)
    return next((f"{text} (rank {rank})" for rank, text in found), None)
