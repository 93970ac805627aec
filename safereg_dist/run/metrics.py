"""Where metrics are written: `metrics.jsonl`, of which all others are told (`tracking`)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from safereg_dist.storage.digests import AppendedFile, FileDigest

METRICS_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to `metrics.jsonl`; on the main rank only."""

    def __init__(self, folder: Path, *, position: int) -> None:
        """Drops what comes after byte `position`: those steps are run again."""
        self._file = AppendedFile(folder / METRICS_NAME)
        try:
            self._file.truncate(position)
        except OSError:
            self._file.close()
            raise

    def write(self, row: Mapping[str, float | int]) -> None:
        """One line of JSON (values that are not finite become null), flushed at once."""
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(finite).encode() + b"\n")
        self._file.flush()

    def digest(self) -> FileDigest:
        """Of all that was written so far, for the checkpoint."""
        return self._file.digest()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
