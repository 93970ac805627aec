"""The folder of a run: which run it belongs to, whether that has ended, and its facts."""

import json
from pathlib import Path
from typing import Any

from safereg_dist.config import Config, config_to_yaml, load_config
from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.factory import Run
from safereg_dist.parallel.comm import Ranks
from safereg_dist.run.checkpoint import config_hash, differences
from safereg_dist.run.versions import versions_of
from safereg_dist.storage.atomic import write_atomically


def is_complete(config: Config, ranks: Ranks) -> bool:
    """True if `output_dir` holds this run, finished; False if the run can start or resume.

    Writes nothing.

    Raises:
        CheckpointError: the folder belongs to another run, or is not a run folder.
    Collectives: one gather of texts.
    """
    folder = Path(config.output_dir)
    with ranks.together():
        known = folder / "config.yaml"
        if known.is_file():
            before = _read_config(known)
            if config_hash(before) != config_hash(config):
                raise CheckpointError(
                    f"{folder} holds a run with another configuration (see {known}): "
                    f"{'; '.join(differences(before, config))}: choose another output_dir, or "
                    "remove the folder"
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"output_dir {folder} exists and holds no config.yaml of a run: choose another"
            )
        return _is_marked_complete(folder / "summary.json")


def _is_marked_complete(summary: Path) -> bool:
    if not summary.is_file():
        return False
    try:
        return json.loads(summary.read_text("utf-8"))["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(
            f"{summary} cannot be read ({err}): remove it to go on from the last checkpoint"
        ) from err


def _read_config(path: Path) -> Config:
    try:
        return load_config(path)
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
            name: {"kept": len(s), "overlong": s.overlong, "dropped": s.dropped}
            for name, s in stores.items()
            if s is not None
        },
        "versions": versions_of("safereg_dist", "torch", "transformers", "deepspeed", "datasets"),
    }
