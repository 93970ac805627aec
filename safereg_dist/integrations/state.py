"""Our part of a checkpoint that another stack writes, under manifests as our own have (`run`).

    CHECKPOINT/safereg/state.json          the coefficient's state, where the logs end
    CHECKPOINT/safereg/risk0.safetensors   risks that rank 0 knows (a file of each rank), if any
    CHECKPOINT/safereg/manifest.json       digests of these, and of the logs up to here
    CHECKPOINT/manifest.json               of a Trainer: digests of all files, the Trainer's too

What is wrong with one of them is named, and the run does not begin.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safereg_dist.config import SigningConfig
from safereg_dist.errors import CheckpointError, reason_of
from safereg_dist.parallel.comm import Ranks
from safereg_dist.run.checkpoint import aside
from safereg_dist.run.ledger import reopen_ledger
from safereg_dist.run.log import RunLog
from safereg_dist.run.manifest import (
    NAME,
    Manifest,
    files_of_rank,
    first_changed,
    first_changed_log,
    read_manifest,
)
from safereg_dist.run.resume import agreed_manifest, first_found
from safereg_dist.run.save import as_checkpoint_errors, seal
from safereg_dist.step import SafetyRegularizer
from safereg_dist.storage.json_text import parse_json
from safereg_dist.storage.signing import Key, signing_key

STATE = "safereg"
"""The folder of a stack's checkpoint that holds our part."""
_FORMAT = 2  # the first, which had no such number, had no manifest
_UNCHECKED = "damage to its files cannot be found"


def save_state(
    folder: Path,
    step: int,
    *,
    regularizer: SafetyRegularizer,
    log: RunLog,
    signing: SigningConfig | None,
) -> None:
    """Writes the regulariser's state after `step` steps; `folder` is replaced as a whole.

    Raises:
        CheckpointError: it cannot be written, on all ranks.
        ConfigError: the key is missing.
    Collectives: a gather, and of texts.
    """
    ranks, partial = regularizer.ranks, aside(folder)
    metrics_bytes, ledger_bytes = log.positions(ranks)
    with ranks.together(), as_checkpoint_errors(folder):
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with ranks.together(), as_checkpoint_errors(folder):
        state = {
            "format": _FORMAT,
            "regularizer": regularizer.save_state(partial / f"risk{ranks.rank}.safetensors"),
            "metrics_bytes": metrics_bytes,
            "ledger_bytes": ledger_bytes,
        }
        if ranks.is_main:
            (partial / "state.json").write_text(json.dumps(state) + "\n", "utf-8")
    seal(partial, step, logs=log.digests(), signing=signing, ranks=ranks)
    with ranks.together(), as_checkpoint_errors(folder):
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)


def load_state(
    folder: Path,
    step: int,
    *,
    regularizer: SafetyRegularizer,
    logs: Path,
    signing: SigningConfig | None,
) -> tuple[int, list[int]]:
    """Restores what `save_state` wrote after `step` steps, if it and the logs are as then.

    Returns the bytes of metrics, and of each rank's ledger, that were in the folder `logs`.

    Raises:
        CheckpointError: they are not, or the state cannot be read, on all ranks.
        LedgerError: the chain of a finished ledger does not hold.
        ConfigError: the key is missing.
    Collectives: a broadcast and gathers of texts.
    """
    ranks = regularizer.ranks

    def read(key: Key | None) -> Manifest | None:
        if key is None and not (folder / NAME).exists():
            known = parse_json((folder / "state.json").read_bytes())
            if isinstance(known, dict) and "format" not in known:
                print(f"{folder} is of an earlier version: {_UNCHECKED}", flush=True)
                return None
        manifest = read_manifest(folder, key)
        if manifest.step != step:
            raise ValueError(f"{NAME} is of step {manifest.step}, the checkpoint of {step}")
        return manifest

    wrong = _wrong_with(folder, read, logs, signing, ranks)
    with ranks.together(), _usable(folder, wrong):
        known = parse_json((folder / "state.json").read_bytes())
        regularizer.load_state(folder / f"risk{ranks.rank}.safetensors", known["regularizer"])
        return int(known["metrics_bytes"]), list(known["ledger_bytes"])


def check_checkpoint(checkpoint: Path, *, signing: SigningConfig | None, ranks: Ranks) -> int:
    """The step of a Trainer's checkpoint, whose files are those that were sealed.

    Without a key there may be more files, and there need be no manifest: a kill can come before it,
    when older checkpoints are gone already.

    Raises:
        CheckpointError: a file has changed or is missing, on all ranks.
        ConfigError: the key is missing.
    Collectives: a broadcast and gathers of texts.
    """

    def read(key: Key | None) -> Manifest | None:
        if key is None and not (checkpoint / NAME).exists():
            print(
                f"{checkpoint} has no {NAME}: it is of an earlier version, or a kill came before "
                f"it: {_UNCHECKED}",
                flush=True,
            )
            return None
        return read_manifest(checkpoint, key, may_hold_more=key is None)

    wrong = _wrong_with(checkpoint, read, checkpoint, signing, ranks)
    with ranks.together(), _usable(checkpoint, wrong):
        return int(parse_json((checkpoint / "trainer_state.json").read_bytes())["global_step"])


def _wrong_with(
    folder: Path,
    read: Callable[[Key | None], Manifest | None],
    logs: Path,
    signing: SigningConfig | None,
    ranks: Ranks,
) -> str | None:
    """What is wrong with the manifest that rank 0 reads, a file or a log, on all ranks."""
    key = None
    with ranks.together():
        if ranks.is_main:
            key = signing_key(signing)
    manifest = agreed_manifest(lambda: read(key), ranks)
    if not isinstance(manifest, Manifest):
        return manifest
    files, ends = (
        files_of_rank(names, ranks.rank, ranks.world_size)
        for names in (manifest.files, manifest.logs)
    )
    wrong = first_found(first_changed(folder, manifest.files, files), ranks)
    if wrong or not manifest.logs:
        return wrong
    with ranks.together():
        if ranks.is_main:
            reopen_ledger(logs)  # where the run had finished
    return first_found(first_changed_log(logs, manifest.logs, ends), ranks)


@contextmanager
def _usable(folder: Path, wrong: str | None) -> Iterator[None]:
    """A block that reads a folder with which nothing is wrong."""
    try:
        if wrong:
            raise ValueError(wrong)
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(
            f"expected in {folder} what this run has written, got: {reason_of(err)}: resume from "
            "another checkpoint of this run, or restore the file from a copy"
        ) from err
