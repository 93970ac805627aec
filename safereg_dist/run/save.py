"""Saving a run: the same three steps on every rank, the last two in a thread if so configured.

    snapshot   every rank writes its part; no rank trains meanwhile
    deliver    a rank's files are on the shared disk, their digests are in its `rank0.done`
    publish    rank 0 has seen all of these: it writes the manifest, and renames the folder

With `train.async_save` the snapshot goes to a disk of the host, and a thread of each rank copies it
from there while training goes on. The thread uses files alone: a collective in it could meet one of
training's. Until the rename the checkpoint before is the newest, so a kill costs nothing else.
"""

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from safereg_dist.config import SigningConfig
from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.comm import Ranks, capture
from safereg_dist.parallel.engine import PolicyEngine
from safereg_dist.run.checkpoint import RunState, aside, saved_checkpoints
from safereg_dist.run.manifest import (
    Digests,
    Manifest,
    files_below,
    merged,
    own_digests,
    part_of,
    write_manifest,
)
from safereg_dist.run.random_states import save_random
from safereg_dist.run.staging import emptied
from safereg_dist.step import SafetyRegularizer
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.digests import copied
from safereg_dist.storage.signing import Key, signing_key

_RESERVE_BYTES = 64 << 20
"""Free disk required beyond the size of a checkpoint, for logs."""
_LOOK_S = 0.05  # between two looks for another rank's part
_TURN_S = 1.0  # after which ranks that wait for a thread tell one another
_NICE = 10  # of the threads that copy
_LET_GO_S = 5.0  # for a thread to notice that it is not waited for any more


class Saver:
    """Writes the checkpoints of a run, one at a time; all ranks call every method but `error`.

    Leaving its block while one is in flight gives that one up.
    """

    def __init__(
        self,
        folder: Path,
        *,
        engine: PolicyEngine,
        regularizer: SafetyRegularizer,
        ranks: Ranks,
        keep: int,
        staging: Path | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        """Checkpoints go below `folder`, of which the newest `keep` stay.

        Args:
            staging: this rank's own folder on its host; with it a thread delivers and publishes.
            timeout_s: patience with another rank's part, in seconds.
        """
        self._folder = folder
        self._engine = engine
        self._regularizer = regularizer
        self._ranks = ranks
        self._keep = keep
        self._staging = staging
        self._timeout_s = timeout_s
        self._partial: Path | None = None
        """The checkpoint that is not whole yet."""
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._blocked_before = 0.0
        self.saves = 0
        """Checkpoints that are whole."""
        self.seconds = 0.0
        """From the beginning of each until it was whole, as rank 0 sees it."""
        self.blocked_seconds = 0.0
        """Of these, time in which no rank trained."""
        self.error: Exception | None = None
        """What ended this rank's thread; it goes with the flags of the next step."""

    # ---- the main path

    def save(self, state: RunState, *, logs: Digests, key: Key | None) -> None:
        """Writes one checkpoint, or begins to: with staging it is whole after `wait`.

        `logs` are the digests of this rank's logs up to here; `key` signs, on rank 0.

        Raises:
            CheckpointError: it, or the one before it, could not be written; earlier ones stay.
        Collectives: the engine's own, a broadcast, four gathers of texts, those of `wait`.
        """
        self.wait()
        began = time.perf_counter()
        final = self._folder / f"step-{state.step:08d}"
        # A mark of its own: ranks that outlive a kill of others may still copy into the last one.
        mark = self._ranks.from_main(f".{secrets.token_hex(4)}")
        self._partial = partial = aside(final, mark)
        source = self._staging or partial
        with self._ranks.together():
            self._make_room(partial)
        self._snapshot(source, state)

        def deliver() -> None:
            self._deliver(source, partial, logs)

        def publish() -> None:
            if self._ranks.is_main:
                self._publish(partial, final, key)

        def note_end() -> None:
            self.seconds += time.perf_counter() - began

        if self._staging is None:
            for part in (deliver, publish):
                with self._ranks.together(), as_checkpoint_errors(self._folder):
                    part()
            note_end()
            self._is_whole()
        else:
            self._start(deliver, publish, note_end)
        self.blocked_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Returns when no checkpoint is in flight.

        Raises:
            CheckpointError: a rank could not write its part, or was not done in time.
        Collectives: none, or MAX all-reduces of 8 bytes, one a second while a thread runs.
        """
        if self._thread is None:
            return
        began = time.perf_counter()
        while self._ranks.max_over_ranks(capture(self._is_in_flight, began)):
            pass
        self.blocked_seconds += time.perf_counter() - began
        self._is_whole()

    def restore(self, state: RunState) -> None:
        """Goes on counting where the run was."""
        self.saves, self.seconds = state.saves + 1, state.save_seconds  # itself too
        blocked = state.save_blocked_seconds
        self.blocked_seconds = state.save_seconds if blocked is None else blocked
        self._blocked_before = self.blocked_seconds

    def blocked(self) -> float:
        """Seconds since the last call in which saving kept all ranks from training."""
        before, self._blocked_before = self._blocked_before, self.blocked_seconds
        return self.blocked_seconds - before

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up.set()
        is_let_go = True
        if self._thread is not None:
            self._thread.join(_LET_GO_S)
            is_let_go = not self._thread.is_alive()
        # A thread that goes on could publish what is half removed; the next start removes it.
        if self._partial is not None and self._ranks.is_main and is_let_go:
            shutil.rmtree(self._partial, ignore_errors=True)
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)

    # ---- the three steps

    def _make_room(self, partial: Path) -> None:
        if self._ranks.is_main:
            self._require_disk()
        with as_checkpoint_errors(self._folder):
            if self._ranks.is_main:
                partial.mkdir(parents=True)
            if self._staging is not None:
                emptied(self._staging)

    def _snapshot(self, folder: Path, state: RunState) -> None:
        """This rank's part, in a folder of its own or in one that all share."""
        ranks = self._ranks
        with as_checkpoint_errors(folder):
            self._engine.save(folder / "engine")
        with ranks.together(), as_checkpoint_errors(folder):
            save_random(folder / f"rank{ranks.rank}.safetensors", ranks.device)
            small = self._regularizer.save_state(folder / f"risk{ranks.rank}.safetensors")
            if ranks.is_main:
                counted = replace(
                    state,
                    regularizer=small,
                    saves=self.saves,
                    save_seconds=self.seconds,
                    save_blocked_seconds=self.blocked_seconds,
                )
                (folder / "state.json").write_text(json.dumps(asdict(counted)), "utf-8")

    def _deliver(self, source: Path, partial: Path, logs: Digests) -> None:
        """Copies this rank's files where they are not in their place, and says that they are."""
        if source == partial:  # no file comes or goes: the snapshot of all ranks is there
            files = own_digests(partial, self._ranks.rank, self._ranks.world_size)
        else:
            files = {}
            for name in files_below(source):
                files[name] = copied(source / name, partial / name)
                (source / name).unlink()
        write_atomically(_marker(partial, self._ranks.rank), part_of(files, logs))

    def _publish(self, partial: Path, final: Path, key: Key | None) -> None:
        """The checkpoint appears whole, once every rank has delivered; older ones go."""
        files, logs = self._delivered(partial)
        write_manifest(partial, Manifest(_step_of(final), files, logs), key)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(self._folder)  # before an older one goes
        for old in saved_checkpoints(self._folder)[: -self._keep]:
            # Renamed first: what a kill leaves of it, the next start removes.
            os.replace(old, aside(old))
            shutil.rmtree(aside(old))

    def _delivered(self, partial: Path) -> tuple[Digests, Digests]:
        """The digests of all ranks' files and logs; their markers are gone then."""
        markers = [_marker(partial, rank) for rank in range(self._ranks.world_size)]
        began = time.monotonic()
        while missing := [path.stem for path in markers if not path.exists()]:
            if time.monotonic() - began > self._timeout_s:
                raise CheckpointError(
                    f"expected the parts of all ranks in {partial} within {self._timeout_s:.0f} s "
                    f"(engine.timeout_s), that of {', '.join(missing[:8])} never came: see whether "
                    "that rank's host still writes to output_dir; the run goes on from the "
                    "checkpoint before this one"
                )
            if self._given_up.wait(_LOOK_S):
                raise CheckpointError(f"{partial} was given up: the run has ended")
        found = merged([path.read_bytes() for path in markers])
        for path in markers:
            path.unlink()
        return found

    # ---- the thread

    def _start(self, *steps: Any) -> None:
        def run() -> None:
            # Of this thread alone, as Linux has it: who trains on the host's cores goes first.
            own = os.PRIO_PROCESS, threading.get_native_id()
            with suppress(OSError):  # elsewhere there is no such process
                os.setpriority(*own, max(_NICE, os.getpriority(*own)))
            try:
                with as_checkpoint_errors(self._folder):
                    for step in steps:
                        step()
            except Exception as err:
                self.error = err

        self._thread = threading.Thread(target=run, name="save", daemon=True)
        self._thread.start()

    def _is_in_flight(self, began: float) -> int:
        """1 while this rank's thread runs, else 0; raises what ended it."""
        assert self._thread is not None
        self._thread.join(_TURN_S)
        runs = self._thread.is_alive()  # before the error is looked at, which comes before its end
        if self.error is not None:
            raise self.error
        if runs and time.perf_counter() - began > self._timeout_s:
            raise CheckpointError(
                f"expected {self._partial} to be whole within {self._timeout_s:.0f} s "
                "(engine.timeout_s) of waiting for it, this rank still copies its part: see how "
                "fast its host writes to output_dir"
            )
        return int(runs)

    def _is_whole(self) -> None:
        self._thread = self._partial = None
        self.saves += 1

    # ---- room

    def _require_disk(self) -> None:
        needed = self._checkpoint_bytes() + _RESERVE_BYTES
        existing = next(p for p in (self._folder, *self._folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise CheckpointError(
                f"expected {needed / 1e9:.2f} GB free in {existing} for a checkpoint, found "
                f"{free / 1e9:.2f} GB: free some space, lower train.keep_checkpoints, or move "
                "output_dir"
            )

    def _checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: the size of the last one, else 16 per parameter."""
        written = saved_checkpoints(self._folder)
        if written:
            return sum(f.stat().st_size for f in written[-1].rglob("*") if f.is_file())
        model = self._regularizer.policy.model
        return 16 * sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def seal(
    folder: Path, step: int, *, logs: Digests, signing: SigningConfig | None, ranks: Ranks
) -> None:
    """Writes the manifest of a folder that all ranks have filled; `logs` are this rank's.

    Raises:
        CheckpointError: a file cannot be read, or the manifest written, on all ranks.
        ConfigError: the key is missing.
    Collectives: four gathers of texts.
    """
    ranks.raise_together(None)  # a rank's last file is there
    own = ""
    with ranks.together(), as_checkpoint_errors(folder):
        own = part_of(own_digests(folder, ranks.rank, ranks.world_size), logs)
    parts = ranks.gather_texts(own)
    with ranks.together():
        if ranks.is_main:
            files, all_logs = merged(parts)
            write_manifest(folder, Manifest(step, files, all_logs), signing_key(signing))


def _marker(partial: Path, rank: int) -> Path:
    return partial / f"rank{rank}.done"


def _step_of(final: Path) -> int:
    return int(final.name.removeprefix("step-"))


@contextmanager
def as_checkpoint_errors(folder: Path) -> Iterator[None]:
    """A block whose write errors become CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as err:
        raise CheckpointError(
            f"expected to write a checkpoint to {folder}, got: {err}: free disk space, and go on "
            "from the newest checkpoint"
        ) from err


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
