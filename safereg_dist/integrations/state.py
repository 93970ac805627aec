"""Our part of a checkpoint that another stack writes, under manifests as our own have (`run`).

    CHECKPOINT/safereg/state.json          the coefficient's state, where the logs end
    CHECKPOINT/safereg/risk0.safetensors   risks that rank 0 knows (a file of each rank), if any
    CHECKPOINT/safereg/manifest.json       digests of these, and of the logs up to here
    CHECKPOINT/manifest.json               of a Trainer: digests of all files, the Trainer's too

What is wrong with one of them is named, and the run does not begin.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safereg_dist.config import SigningConfig, config_from_dict
from safereg_dist.errors import CheckpointError, reason_of
from safereg_dist.parallel.comm import Ranks
from safereg_dist.run.checkpoint import aside, differences
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
from safereg_dist.screen.progress import say
from safereg_dist.step import SafetyRegularizer
from safereg_dist.storage.json_text import parse_json
from safereg_dist.storage.signing import SUFFIX, Key, signing_key

STATE = "safereg"
"""The folder of a stack's checkpoint that holds our part."""
_FORMAT = 2  # the first, which had no such number, had no manifest
_OWN = re.compile(r"state\.json|manifest\.json(\.sig)?|risk\d+(-.*)?\.safetensors")
"""Names of the files in `STATE`."""
_UNKNOWN = {"model": "-", "risk": {"estimator": "none"}}
"""What a configuration needs and a regulariser may not know."""
_RESTORE = "resume from another checkpoint of this run, or restore the file from a copy"
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
        CheckpointError: it cannot be written, or holds what this function does not write, on all
            ranks; nothing is removed then.
        ConfigError: the key is missing.
    Collectives: a gather, and of texts.
    """
    ranks, partial = regularizer.ranks, aside(folder)
    metrics_bytes, ledger_bytes = log.positions(ranks)
    with ranks.together(), as_checkpoint_errors(folder):
        if ranks.is_main:
            _require_own(folder)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with ranks.together(), as_checkpoint_errors(folder):
        state = {
            "format": _FORMAT,
            "regularizer": regularizer.save_state(partial / f"risk{ranks.rank}.safetensors"),
            "settings": regularizer.settings,
            "world_size": ranks.world_size,
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


def _require_own(folder: Path) -> None:
    """Raises CheckpointError where a folder, if there is one, holds what is not ours."""
    names = os.listdir(folder) if folder.exists() else []
    if foreign := sorted(name for name in names if not _OWN.fullmatch(name)):
        shown = ", ".join([*foreign[:3], *["..."][: len(foreign) > 3]])
        raise CheckpointError(
            f"expected {folder} to be missing, empty or as an earlier save left it, found {shown}: "
            "save into a folder of its own, e.g. CHECKPOINT/safereg, which is replaced as a whole"
        )


def load_state(
    folder: Path,
    step: int,
    *,
    regularizer: SafetyRegularizer,
    logs: Path,
    signing: SigningConfig | None,
) -> tuple[int, list[int], int | None]:
    """Restores what `save_state` wrote after `step` steps, if it and the logs are as then.

    Returns the bytes of metrics, and of each rank's ledger, that were in the folder `logs`, and the
    number of ranks that wrote it (None of earlier versions).

    Raises:
        CheckpointError: they are not, the state cannot be read, or the regulariser has other
            settings, on all ranks.
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
        _require_same_settings(folder, known.get("settings"), regularizer.settings)
        before = known.get("world_size")
        written = range(before or ranks.world_size)
        risks = [folder / f"risk{rank}.safetensors" for rank in written]
        is_same = len(risks) == ranks.world_size
        regularizer.load_state(risks[ranks.rank] if is_same else risks, known["regularizer"])
        return int(known["metrics_bytes"]), list(known["ledger_bytes"]), before


def _require_same_settings(
    folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> None:
    """Raises CheckpointError where settings on which the weights depend have changed."""
    if before is None:
        return  # of an earlier version
    configs = [
        config_from_dict({**_UNKNOWN, **each, "data": {"train": "-", **each.get("data", {})}})
        for each in (before, now)
    ]
    changed = [
        # A stack that goes on holds other weights than it began with: it has to name those then.
        text
        for text in differences(*configs)
        if not text.startswith("reference.model was None")
    ]
    if changed:
        raise CheckpointError(
            f"{folder} was written with other settings: {'; '.join(changed)}: resume with the same "
            "ones, or begin anew in another output_dir"
        )


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
    """What is wrong with the manifest that rank 0 reads, a file or a log, and what to do about it,
    on all ranks."""
    key = None
    with ranks.together():
        if ranks.is_main:
            key = signing_key(signing)
            if key is None and (folder / f"{NAME}{SUFFIX}").exists():
                say(f"{folder} is signed and `signing` is not set: what follows will not be signed")
    manifest = agreed_manifest(lambda: _looked_at(folder, read, key), ranks)
    if not isinstance(manifest, Manifest):
        return manifest
    files, ends = (
        files_of_rank(names, ranks.rank, ranks.world_size)
        for names in (manifest.files, manifest.logs)
    )
    wrong = first_found(first_changed(folder, manifest.files, files), ranks)
    if wrong or not manifest.logs:
        return wrong and f"{wrong}: {_RESTORE}"
    with ranks.together():
        if ranks.is_main:
            reopen_ledger(logs)  # where the run had finished
    wrong = first_found(first_changed_log(logs, manifest.logs, ends), ranks)
    return wrong and (
        f"{wrong}: these are not the logs of its run, which was begun anew here (resume from a "
        "newer start's checkpoint) or was moved (set output_dir to the logs' folder); else restore "
        "them from a copy"
    )


def _looked_at(
    folder: Path, read: Callable[[Key | None], Manifest | None], key: Key | None
) -> Manifest | None:
    """What is read. Raises ValueError: why it cannot be used, and what to do."""
    if not folder.is_dir():
        if folder.name == STATE and folder.parent.is_dir():
            raise ValueError(
                "no such folder: the checkpoint was made without safereg: load its weights as the "
                "model, and start anew, without resume_from_checkpoint"
            )
        raise ValueError("no such folder: check the path")
    try:
        return read(key)
    except (OSError, ValueError, CheckpointError) as err:
        remedy = _RESTORE
        if key is not None and not (folder / f"{NAME}{SUFFIX}").exists():
            remedy += ", or leave `signing` out where the run began without it"
        raise ValueError(f"{reason_of(err)}: {remedy}") from err


@contextmanager
def _usable(folder: Path, wrong: str | None) -> Iterator[None]:
    """A block that reads a folder with which nothing is wrong."""
    expected = f"expected in {folder} what this run has written, got"
    if wrong:
        raise CheckpointError(f"{expected}: {wrong}")
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{expected}: {reason_of(err)}: {_RESTORE}") from err
