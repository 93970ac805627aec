"""The manifest of a checkpoint: the digest of every file, written last and checked first.

    manifest.json       step; digest of each file; digest of each log up to this step; its own
    manifest.json.sig   its signature, where the run has a key (`signing`)

Each rank digests the files that it wrote, and checks those that it reads: no rank reads them all.
A file belongs to the rank in its name (rank1, risk1, zero_pp_rank_1, __1_0); one without is read
by all ranks and was written by rank 0. A checkpoint of more ranks is dealt over those there are.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safereg_dist.errors import CheckpointError
from safereg_dist.storage.digests import FileDigest, digest_of
from safereg_dist.storage.json_text import parse_json
from safereg_dist.storage.signing import SUFFIX, Key, what_is_wrong, write_signed

NAME = "manifest.json"
_FORMAT = 1
_RANK_OF = re.compile(r"(?:^|[_.])(?<!mp_)(?:rank_?|risk|_)(\d+)(?=[-_.])")  # mp_: not of data
_OF_STEP = re.compile(r"step-.*|checkpoint-\d+")  # ours, a Trainer's

Digests = Mapping[str, FileDigest]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds, by paths below its folder, and how long the run's logs were."""

    step: int
    files: Digests
    logs: Digests
    """By names in the run folder."""
    format: int = field(default=_FORMAT)

    def to_bytes(self) -> bytes:
        """The one text of this manifest; its last value is the digest of the rest."""
        plain = {name: getattr(self, name) for name in ("step", "files", "logs", "format")}
        own = hashlib.sha256(_canonical(plain)).hexdigest()
        return _canonical({**plain, "manifest": own})

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest":
        """The manifest that has this text.

        Raises:
            ValueError: it is not the text of one; any changed bit is found.
        """
        try:
            plain = parse_json(content)
            files, logs = (_digests(plain[name]) for name in ("files", "logs"))
            found = cls(plain["step"], files, logs, plain["format"])
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ValueError("no manifest, or a changed one") from err
        if found.to_bytes() != content:
            raise ValueError("it does not have its own digest")
        if found.format != _FORMAT:
            raise ValueError(f"format {found.format}, this version of safereg_dist reads {_FORMAT}")
        return found


def _canonical(plain: object) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def _digests(plain: dict[str, list]) -> Digests:
    return {name: FileDigest(*values) for name, values in plain.items()}


# ---- writing


def part_of(files: Digests, logs: Digests) -> str:
    """What a rank tells rank 0 of the files and logs that it wrote."""
    return json.dumps({"files": files, "logs": logs})


def merged(parts: Iterable[str | bytes]) -> tuple[Digests, Digests]:
    """The digests of all ranks' files, and of their logs."""
    found = [parse_json(part) for part in parts]
    files, logs = (
        {name: FileDigest(*digest) for part in found for name, digest in part[kind].items()}
        for kind in ("files", "logs")
    )
    return files, logs


def own_digests(folder: Path, rank: int, world_size: int) -> Digests:
    """Digests of the files below `folder` that this rank wrote; they are on the disk then.

    Raises:
        OSError: a file cannot be read.
    """
    own = (name for name in files_below(folder) if _writer(name) % world_size == rank)
    return {name: digest_of(folder / name, sync=True) for name in own}


def write_manifest(folder: Path, manifest: Manifest, key: Key | None) -> None:
    """Writes `manifest.json` and its signature.

    Raises:
        CheckpointError: it cannot be written, or rank 0 does not see what the ranks wrote.
    """
    different = sorted(manifest.files.keys() ^ set(files_below(folder)))
    if different:
        raise CheckpointError(
            f"expected the files of all ranks in {folder}, but rank 0 and the others do not both "
            f"see {different[0]}: output_dir must be one folder for all hosts"
        )
    write_signed(folder / NAME, manifest.to_bytes(), key)


def files_below(folder: Path) -> list[str]:
    """Sorted relative paths of everything below a folder but folders and the manifest's files."""
    found = (
        Path(place, name).relative_to(folder).as_posix()
        for place, folders, names in os.walk(folder)
        for name in (*names, *(f for f in folders if Path(place, f).is_symlink()))
    )
    return sorted(name for name in found if name not in (NAME, NAME + SUFFIX))


def _writer(name: str) -> int:
    marked = _RANK_OF.search(name.rpartition("/")[2])
    return int(marked[1]) if marked else 0


# ---- checking


def read_manifest(folder: Path, key: Key | None, *, may_hold_more: bool = False) -> Manifest:
    """The manifest of a checkpoint, if its folder holds the files that it names and no others.

    With `may_hold_more` others are not looked at.

    Raises:
        ValueError: what is wrong with it: missing, changed, not signed with `key`, of another step
            than its folder, or silent on a file.
    """
    path = folder / NAME
    try:
        content = path.read_bytes()
    except OSError as err:
        raise ValueError(f"{NAME} cannot be read: {err.strerror}") from err
    wrong = None if key is None else what_is_wrong(path, content, key)
    if wrong:
        raise ValueError(wrong)
    try:
        manifest = Manifest.from_bytes(content)
    except ValueError as err:
        raise ValueError(f"{NAME}: {err}") from err
    named = (f"step-{manifest.step:08d}", f"checkpoint-{manifest.step}")
    if _OF_STEP.fullmatch(folder.name) and folder.name not in named:
        raise ValueError(f"{NAME} is of step {manifest.step}")
    different = manifest.files.keys() ^ set(files_below(folder))
    different = sorted(different & manifest.files.keys() if may_hold_more else different)
    if different:
        kind = "is missing" if different[0] in manifest.files else "is not in the manifest"
        raise ValueError(f"{different[0]} {kind}")
    return manifest


def files_of_rank(names: Iterable[str], rank: int, world_size: int) -> list[str]:
    """Those of these files that a rank reads."""
    return [
        name
        for name in names
        if not _RANK_OF.search(name.rpartition("/")[2]) or _writer(name) % world_size == rank
    ]


def first_changed(folder: Path, digests: Digests, names: Iterable[str]) -> str | None:
    """What is wrong with the first of these files that is not as digested; None where all are."""
    for name in names:
        path, wanted = folder / name, digests[name]
        try:
            if path.is_symlink() or not path.is_file():
                return f"{name} is not a file"
            size = path.stat().st_size
            if size != wanted.bytes:
                return f"{name}: expected {wanted.bytes} bytes, found {size}"
        except OSError as err:
            return f"{name} cannot be read: {err.strerror}"
        if changed := first_changed_log(folder, digests, [name]):
            return changed
    return None


def first_changed_log(folder: Path, digests: Digests, names: Iterable[str]) -> str | None:
    """As `first_changed`, for logs: they may have grown since."""
    for name in names:
        try:
            found = digest_of(folder / name, digests[name].bytes)
        except OSError as err:
            return f"{name} cannot be read: {err.strerror}"
        if found != digests[name]:
            return f"{name} was changed: expected {digests[name]}, found {found}"
    return None
