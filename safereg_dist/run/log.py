"""The logs of a training run: metrics on the main rank, a ledger on every rank."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.run.ledger import RankLedger, cut_ledgers_of_gone_ranks, reopen_ledger
from safereg_dist.run.metrics import METRICS_NAME, MetricsWriter
from safereg_dist.storage.digests import FileDigest
from safereg_dist.types import LedgerRow


class RunLog:
    """Appends to `metrics.jsonl` and this rank's ledger.

    A full disk causes an error on one rank, in the middle of a step. The rank keeps the error, its
    flag goes with the next step's metrics, and all ranks raise it together.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        metrics_bytes: int,
        ledger_bytes: Sequence[int],
    ) -> None:
        """Opens all files where a checkpoint left them.

        Args:
            ledger_bytes: positions in the ledgers of ranks 0, 1, ..., also of ranks that are gone.
        """
        self.error: CheckpointError | None = None
        self._folder = folder
        self._metrics: MetricsWriter | None = None
        self._gone = list(ledger_bytes[ranks.world_size :])
        self._digests_of_gone: dict[str, FileDigest] = {}
        """Of the ledgers of ranks that are gone, on the main rank; they do not change any more."""
        with ranks.together():
            if ranks.is_main:
                reopen_ledger(folder)  # if the run was killed before its summary
                self._digests_of_gone = cut_ledgers_of_gone_ranks(
                    folder, ledger_bytes, world_size=ranks.world_size
                )
        with ranks.together(), ExitStack() as stack:
            try:
                self._ledger = RankLedger(folder, ranks.rank)
                stack.callback(self._ledger.close)
                self._ledger.truncate(dict(enumerate(ledger_bytes)).get(ranks.rank, 0))
                if ranks.is_main:
                    self._metrics = MetricsWriter(folder, position=metrics_bytes)
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

    def write_change(self, step: int, before: int, now: int) -> None:
        """Notes in the main rank's ledger that from `step` on there is another number of ranks."""
        if self._metrics is not None:
            self._ledger.append_change(step, before, now)

    def digests(self) -> dict[str, FileDigest]:
        """Of this rank's files so far, flushed, by name: what a checkpoint keeps of them.

        Raises:
            CheckpointError: a file could not be written.
        """
        try:
            found = {self._ledger.name: self._ledger.digest(), **self._digests_of_gone}
            if self._metrics is not None:
                found[METRICS_NAME] = self._metrics.digest()
            return found
        except OSError as err:
            raise self._unwritable(err) from err

    def positions(self, ranks: Ranks) -> tuple[int, list[int]]:
        """(bytes of metrics, bytes of each ledger) flushed so far, for a checkpoint.

        Raises:
            CheckpointError: a rank could not write, on all ranks.
        Collectives: one gather, and one of texts.
        """
        with ranks.together():
            own = self.digests()
            metrics = own[METRICS_NAME].bytes if METRICS_NAME in own else 0
            lengths = torch.tensor([metrics, own[self._ledger.name].bytes], device=ranks.device)
        found = ranks.gather(lengths).tolist()
        return found[0][0], [ledger for _, ledger in found] + self._gone

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
