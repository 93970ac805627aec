"""Where metrics are written: `metrics.jsonl` and TensorBoard."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from safereg_dist.storage.digests import AppendedFile, FileDigest

METRICS_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and TensorBoard events; on the main rank only."""

    def __init__(
        self, folder: Path, *, position: int, first_step: int, has_board: bool = True
    ) -> None:
        self._file = AppendedFile(folder / METRICS_NAME)
        self._board = None
        try:
            self._file.truncate(position)
            if has_board:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        except OSError:
            self._file.close()
            raise

    def write(self, row: Mapping[str, float | int]) -> None:
        """One line of JSON (values that are not finite become null), flushed at once."""
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(finite).encode() + b"\n")
        self._file.flush()
        for name, value in row.items():
            if self._board is not None and name != "step":
                self._board.add_scalar(name, value, int(row["step"]))

    def digest(self) -> FileDigest:
        """Of all that was written so far, for the checkpoint."""
        return self._file.digest()

    def close(self) -> None:
        """Closes both writers."""
        try:
            self._file.close()
        finally:
            if self._board is not None:
                self._board.close()
