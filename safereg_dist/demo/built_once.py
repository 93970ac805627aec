"""A folder that is built once: complete or absent, and built again only where its making changed.

A manifest in the folder says what it was made of and the SHA-256 of each of its files.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safereg_dist.errors import ConfigError
from safereg_dist.storage.atomic import whole_folder

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def build_once(
    out: Path,
    made_of: dict[str, Any],
    write: Callable[[Path], None],
    *,
    manifest: str,
    parts: Sequence[str] = (),
) -> None:
    """Calls `write(folder)` unless folder `out` holds what was made of the same.

    `write` fills a sibling folder that then takes the place of `out`. Prints one line.

    Args:
        manifest: file name of the manifest; its stem is what the printed line calls the folder.
        parts: manifests of folders inside `out` that go when `out` is built again.
    Raises:
        ConfigError: `out` holds files that no manifest lists; they are never replaced.
        CheckpointError: `out` cannot be written.
    """
    name, seed = Path(manifest).stem, made_of["seed"]
    if _is_up_to_date(out / manifest, made_of):
        print(f"{name}: {out} is up to date (seed {seed}), nothing to build", flush=True)
        return
    _refuse_foreign_files(out, name, (manifest, *parts))
    started = time.perf_counter()
    with whole_folder(out) as partial:
        write(partial)
        content = {"made_of": made_of, "files": _hashes(partial)}
        (partial / manifest).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{name}: built {out} (seed {seed}) in {time.perf_counter() - started:.0f} s", flush=True)


def made_of_sources(sources: Sequence[str], **arguments: Any) -> dict[str, Any]:
    """Arguments, modules beside this one, Python and libraries: all that decides what is built."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(Path(__file__).with_name(source).read_bytes())
    return {
        **arguments,
        "sources_sha256": digest.hexdigest(),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(manifest, dict) and {"made_of", "files"} <= manifest.keys()
    return manifest if is_ours else None


def _is_up_to_date(path: Path, made_of: dict[str, Any]) -> bool:
    manifest = _read_manifest(path)
    return (
        manifest is not None
        and manifest["made_of"] == made_of
        and manifest["files"].items() <= _hashes(path.parent).items()
    )


def _refuse_foreign_files(out: Path, name: str, manifests: Sequence[str]) -> None:
    """The folder is replaced as a whole, so nothing else may lie in it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(
            f"expected a folder for the {name}, found a file at {out}: choose another"
        )
    ours: set[str] = set()
    for manifest in manifests:
        listed = _read_manifest(out / manifest)
        below = Path(manifest).parent
        ours |= {(below / file).as_posix() for file in listed["files"]} if listed else set()
        ours.add(manifest)
    foreign = sorted(_hashes(out).keys() - ours)
    if foreign:
        raise ConfigError(
            f"{out} holds {foreign[0]} (and {len(foreign) - 1} more), which is not part of a "
            f"{name}: choose a new or empty folder"
        )
