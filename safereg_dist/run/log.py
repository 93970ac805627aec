"""The logs of a training run: metrics on the main rank, a ledger on every rank."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.run.ledger import LedgerRow, RankLedger, reopen_ledger
from safereg_dist.run.metrics import METRICS_NAME, MetricsWriter
from safereg_dist.storage.digests import FileDigest


class RunLog:
    """Appends to `metrics.jsonl`, TensorBoard and this rank's ledger.

    A full disk causes an error on one rank, in the middle of a step. The rank keeps the error, its
    flag goes with the next step's metrics, and all ranks raise it together.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        metrics_bytes: int,
        ledger_bytes: int,
        first_step: int = 0,
        has_board: bool = True,
    ) -> None:
        """`has_board` is False where another stack writes to TensorBoard."""
        self.error: CheckpointError | None = None
        self._folder = folder
        self._metrics: MetricsWriter | None = None
        with ranks.together():
            if ranks.is_main:
                reopen_ledger(folder)  # if the run was killed before its summary
        with ranks.together(), ExitStack() as stack:
            try:
                self._ledger = RankLedger(folder, ranks.rank)
                stack.callback(self._ledger.close)
                self._ledger.truncate(ledger_bytes)
                if ranks.is_main:
                    self._metrics = MetricsWriter(
                        folder,
                        position=metrics_bytes,
                        first_step=first_step,
                        has_board=has_board,
                    )
            except OSError as err:
                raise self._unwritable(err) from err
            stack.pop_all()  # both are open: keeps them open

    def write(self, row: Mapping[str, float | int], ledger_rows: list[LedgerRow]) -> None:
        """Writes one step; keeps an error instead of raising it."""
        try:
            for ledger_row in ledger_rows:
                self._ledger.append(ledger_row)
            if self._metrics is not None:
                self._metrics.write(row)
        except (OSError, CheckpointError) as err:
            self.error = self._unwritable(err)

    def _unwritable(self, err: Exception) -> CheckpointError:
        return CheckpointError(
            f"expected to write the log of the run to {self._folder}, got: {err}: free disk space "
            "and run the same command again"
        )

    def digests(self) -> dict[str, FileDigest]:
        """Of this rank's files so far, flushed, by name: what a checkpoint keeps of them.

        Raises:
            CheckpointError: a file could not be written.
        """
        try:
            found = {self._ledger.name: self._ledger.digest()}
            if self._metrics is not None:
                found[METRICS_NAME] = self._metrics.digest()
            return found
        except OSError as err:
            raise self._unwritable(err) from err

    def positions(self) -> tuple[int, int]:
        """(bytes of this rank's ledger, bytes of metrics) flushed so far, for a checkpoint."""
        found = self.digests()
        metrics = found.get(METRICS_NAME)
        return found[self._ledger.name].bytes, metrics.bytes if metrics else 0

    def finish(self, ranks: Ranks) -> None:
        """Closes all files; an error kept from the last step is raised by all ranks together.

        Collectives: one gather of texts.
        """
        with ranks.together():
            if self.error is not None:
                raise self.error
            self._close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, CheckpointError):  # the block's own error is raised instead
            self._close()

    def _close(self) -> None:
        with ExitStack() as stack:  # a failure to close one must not leave the others open
            stack.callback(self._ledger.close)
            if self._metrics is not None:
                metrics, self._metrics = self._metrics, None
                stack.callback(metrics.close)
