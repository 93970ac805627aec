"""The folder of a run: which run it belongs to, whether that has ended, and its facts."""

import json
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safereg_dist.config import Config, config_to_yaml, load_run_config
from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.factory import Run
from safereg_dist.factory.agreement import named_hosts
from safereg_dist.models.versions import versions_of
from safereg_dist.parallel.comm import Ranks, Result, capture
from safereg_dist.parallel.lost_peer import naming_lost_peers
from safereg_dist.run.checkpoint import config_hash, differences, is_hash_of
from safereg_dist.run.lock import RunLock, is_lock
from safereg_dist.run.stop import failure_noted
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import parse_json

_LOG_BYTES = 16 << 10
"""With less room TensorBoard's own thread fails, where nobody can catch it."""
_LOOKS, _LOOK_S = 20, 0.5
"""How often, and how many seconds apart, a rank looks for what rank 0 has written."""


@contextmanager
def claimed(config: Config, ranks: Ranks, *, writes: bool = True) -> Iterator[bool]:
    """The run folder, locked for this run alone in the block; gives `is_complete`.

    A complete run, and one that only looks (`writes` is False), locks and writes nothing.

    Raises:
        CheckpointError: as `is_complete` and `sole_writer`.
    Collectives: MAX all-reduces of 8 bytes, one a second while a lock is looked at; two gathers.
    """
    is_done = is_complete(config, ranks)
    if is_done or not writes:
        yield is_done
        return
    with sole_writer(Path(config.output_dir), ranks):
        yield is_complete(config, ranks)  # another run may have ended it since


@contextmanager
def sole_writer(folder: Path, ranks: Ranks) -> Iterator[None]:
    """A block in which these ranks, and no other run, write to a folder that they all see.

    Raises:
        CheckpointError: another run holds it, it cannot be written, or a host does not see it.
    Collectives: MAX all-reduces of 8 bytes, one a second while a lock is looked at; two gathers.
    """
    lock = RunLock(folder)
    try:
        # Rank 0 looks for a second at a time: the others' patience ends with `engine.timeout_s`.
        while not ranks.max_over_ranks(capture(lock.take) if ranks.is_main else Result(0)):
            pass
        _require_one_folder(folder, lock, ranks)
        with failure_noted(folder) if ranks.is_main else nullcontext(), naming_lost_peers():
            yield
    finally:
        lock.release()


def _require_one_folder(folder: Path, lock: RunLock, ranks: Ranks) -> None:
    """Raises CheckpointError where a rank does not see the lock that rank 0 has just written."""
    name, text = json.loads(ranks.gather_texts(json.dumps([lock.name, lock.text]))[0])
    own = [socket.gethostname(), _finds(folder / name, text)]
    sees = [json.loads(each) for each in ranks.gather_texts(json.dumps(own))]
    blind = {rank: host for rank, (host, sees_it) in enumerate(sees) if not sees_it}
    if blind:
        raise CheckpointError(
            f"output_dir {folder} is not one folder for all ranks: rank 0 on {sees[0][0]} wrote "
            f"{name} there, and {named_hosts(blind)} cannot see it: set output_dir to a folder on "
            "a file system that all hosts share"
        )


def _finds(path: Path, text: str) -> bool:
    """Whether a file holds this text, by now or within seconds: a shared one may come late."""
    for _ in range(_LOOKS):
        with suppress(OSError, ValueError):
            if path.read_text("utf-8") == text:
                return True
        time.sleep(_LOOK_S)
    return False


def is_complete(config: Config, ranks: Ranks) -> bool:
    """True if `output_dir` holds this run, finished; False if the run can start or resume.

    Rank 0 looks, and decides for all. Writes nothing.

    Raises:
        CheckpointError: the folder belongs to another run, or is not a run folder.
    Collectives: one MAX all-reduce of 8 bytes.
    """
    own = capture(lambda: int(_is_complete(config))) if ranks.is_main else Result(0)
    return ranks.max_over_ranks(own) == 1


def _is_complete(config: Config) -> bool:
    folder = Path(config.output_dir)
    known = folder / "config.yaml"
    if known.is_file():
        before = _read_config(known)
        if not is_hash_of(config_hash(before), config):
            raise CheckpointError(
                f"{folder} holds a run with another configuration (see {known}): "
                f"{'; '.join(differences(before, config))}: to go on with it give the values that "
                "it began with (key=value at the end of the command), else another output_dir"
            )
    elif folder.exists() and not (folder.is_dir() and all(map(is_lock, folder.iterdir()))):
        raise CheckpointError(
            f"output_dir {folder} exists and holds no config.yaml of a run: choose another"
        )
    return _is_marked_complete(folder / "summary.json")


def _is_marked_complete(summary: Path) -> bool:
    if not summary.is_file():
        return False
    try:
        return parse_json(summary.read_bytes())["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(
            f"{summary} cannot be read ({err}): remove it to go on from the last checkpoint"
        ) from err


def _read_config(path: Path) -> Config:
    try:
        return load_run_config(path)
    except ConfigError as err:
        raise CheckpointError(
            f"{path} is not the configuration of a run ({err}): choose another output_dir"
        ) from err


def claim_folder(folder: Path, config: Config) -> None:
    """Makes the run folder and writes the resolved `config.yaml`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", config_to_yaml(config))
    except OSError as err:
        raise CheckpointError(f"output_dir {folder} cannot be written: {err.strerror}") from err
    free = shutil.disk_usage(folder).free
    if free < _LOG_BYTES:
        raise CheckpointError(
            f"expected {_LOG_BYTES >> 10} KiB free in {folder} for logs, found {free >> 10} KiB: "
            "free some space, or move output_dir"
        )


def describe_run(run: Run) -> dict[str, Any]:
    """Facts of a run: counts of rows, fingerprints, versions, ranks."""
    sources = run.sources
    stores = {"train": sources.train, "anchor": sources.anchor}
    return {
        "world_size": run.ranks.world_size,
        "engine": run.config.engine.name,
        "total_steps": sources.total_steps,
        "rows_per_step": sources.lanes.rows_per_step,
        "threshold": run.regularizer.coefficient.threshold,
        "fingerprints": run.fingerprints,
        "rows": {
            name: {
                "kept": len(s),
                "overlong": s.overlong,
                "dropped": s.dropped,
                "digest": s.content_hash,
            }
            for name, s in stores.items()
            if s is not None
        },
        "versions": versions_of("safereg_dist", "torch", "transformers", "deepspeed", "datasets"),
    }
