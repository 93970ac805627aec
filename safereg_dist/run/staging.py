"""Folders on a host's own disk, where the ranks leave a checkpoint until it is copied."""

import hashlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

from safereg_dist.errors import ConfigError
from safereg_dist.parallel.comm import Ranks


def staging_folder(given: str | None, output_dir: Path, ranks: Ranks) -> Path:
    """This rank's own folder for a run, below `given` or the host's temporary folder; empty.

    Its owner alone may look into it: it will hold the model. What a killed start of the same run
    has left on this host is removed.

    Raises:
        ConfigError: it cannot be made, or somebody else has made it.
    Collectives: three gathers of texts.
    """
    run = hashlib.sha256(str(output_dir.resolve()).encode()).hexdigest()[:16]
    base = Path(given or tempfile.gettempdir())
    # The host in the name: a folder that several see by mistake is no one's but its host's.
    name = f"safereg-{os.getuid()}-{run}-{socket.gethostname()}"
    own = base / f"{name}-rank{ranks.rank}"
    with ranks.main_first():
        try:
            base.mkdir(parents=True, exist_ok=True)
            if ranks.local_rank == 0:
                for left in base.glob(f"{name}-rank*"):
                    _require_own(left)
                    shutil.rmtree(left)
            own.mkdir(0o700)
        except OSError as err:
            raise ConfigError(
                f"expected to make {own} for train.async_save, got: {err.strerror or err}: set "
                "train.save_staging to a folder on each host's own disk"
            ) from err
    return own


def emptied(folder: Path) -> None:
    """Removes what a folder holds.

    Raises:
        OSError: the system's.
    """
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _require_own(path: Path) -> None:
    """Raises PermissionError where it is no folder of this user's, as a link into another place."""
    found = path.lstat()
    if path.is_symlink() or not path.is_dir() or found.st_uid != os.getuid():
        raise PermissionError(0, f"{path} is not a folder of this user's")
