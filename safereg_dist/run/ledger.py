"""The ledger: one row per sequence and optimizer step, chained by hash.

While training, each rank appends to a file of its own, `ledger.rank{rank}.jsonl`; nothing is sent
between ranks. At the end `merge_ledgers` orders all rows by (step, micro_batch, rank, row) into
`ledger.jsonl` and chains them:

    hash_0 = sha256("safereg-dist ledger format 1")
    hash_i = sha256(hash_{i-1} || row_i)      row_i = canonical JSON of the row, without its hash

`summary.json` keeps the last hash and the number of rows, and `verify_ledger` holds the file
against them. Where a run went on with another number of ranks, a row of its own says so before the
step's others: {"micro_batch": -1, "rank": 0, "ranks": [4, 2], "row": 0, "step": 100}. Rows carry
ids, risks and coefficients; never text of the training data.

What an unkeyed chain cannot promise: whoever can rewrite both `ledger.jsonl` and `summary.json` can
compute a new chain that verifies. Where that matters, have the run sign its summary (`signing`) and
verify with the key, or keep the head hash somewhere else (a commit, a ticket).

Where `ledger.jsonl` exists it is the truth, and rank files beside it are leftovers of an
interrupted merge; `reopen_ledger` turns it back into rank files for a resumed run.
"""

import hashlib
import heapq
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from safereg_dist.errors import CheckpointError, LedgerError
from safereg_dist.storage.digests import AppendedFile, FileDigest
from safereg_dist.storage.json_text import parse_json
from safereg_dist.storage.signing import Key, what_is_wrong

if TYPE_CHECKING:  # it loads torch, which verifying does without
    from safereg_dist.types import LedgerRow

FORMAT_VERSION = 1
GENESIS = hashlib.sha256(f"safereg-dist ledger format {FORMAT_VERSION}".encode()).hexdigest()
MERGED_NAME = "ledger.jsonl"
_RANK_FILE = re.compile(r"ledger\.rank(\d+)\.jsonl")
_ORDER = ("step", "micro_batch", "rank", "row")
_BEFORE_THE_STEP = -1
"""The `micro_batch` of a row about the step itself."""
_Key = tuple[int, ...]
_Json = dict[str, Any]


class RankChange(NamedTuple):
    """A step from which a run went on with another number of ranks."""

    step: int
    before: int
    now: int


@dataclass(frozen=True, slots=True)
class LedgerHead:
    """The last hash (hex) of a chain and its number of rows: `ledger` in `summary.json`."""

    head: str
    rows: int
    rank_changes: tuple[RankChange, ...] = field(default=(), compare=False)
    """Those that the rows tell; the hash covers them."""

    def followed_by(self, row: _Json) -> "LedgerHead":
        """The head of the chain with one row more."""
        head = hashlib.sha256(self.head.encode() + _canonical(row)).hexdigest()
        change = (RankChange(row["step"], *row["ranks"]),) if "ranks" in row else ()
        return LedgerHead(head, self.rows + 1, self.rank_changes + change)


class RankLedger:
    """Appends the rows of one rank to `ledger.rank{rank}.jsonl` in a run folder.

    Opening keeps what the file holds: call `truncate` with the checkpoint's position (0 on a fresh
    start) before the first row, since a killed run leaves rows of steps that are run again. A run
    resumed on fewer ranks also calls `cut_ledgers_of_gone_ranks`; their files are merged too.
    """

    def __init__(self, run_dir: Path | str, rank: int) -> None:
        """Opens the file, creating it where there is none.

        Raises:
            LedgerError: the run's ledger was merged already; see `reopen_ledger`.
        """
        merged = Path(run_dir, MERGED_NAME)
        if merged.exists():
            raise LedgerError(
                f"expected an open ledger, found a finished one at {merged}: call `reopen_ledger` "
                "before the ranks go on, or choose another output_dir"
            )
        self._path = rank_path(run_dir, rank)
        self._file = AppendedFile(self._path)

    @property
    def name(self) -> str:
        """The file's name."""
        return self._path.name

    def append(self, row: "LedgerRow") -> None:
        """Adds one row to the buffer; rows come in the order (step, micro_batch, row).

        Raises:
            CheckpointError: the buffer was full and could not be written.
        """
        self._write(_plain(row))

    def append_change(self, step: int, before: int, now: int) -> None:
        """Adds a row that says: from `step` on there are `now` ranks, and were `before`.

        Raises:
            CheckpointError: as `append`.
        """
        place = {"step": step, "micro_batch": _BEFORE_THE_STEP, "rank": 0, "row": 0}
        self._write({**place, "ranks": [before, now]})

    def _write(self, row: _Json) -> None:
        try:
            self._file.write(_canonical(row) + b"\n")
        except OSError as err:
            raise _unwritable(self._path, err) from err

    def flush(self) -> int:
        """Hands the buffer to the system and returns the file's length in bytes; no fsync.

        Raises:
            CheckpointError: the file could not be written.
        """
        try:
            return self._file.flush()
        except OSError as err:
            raise _unwritable(self._path, err) from err

    def digest(self) -> FileDigest:
        """As `flush`, with the SHA-256 of all rows so far: what a checkpoint keeps of the ledger.

        Raises:
            CheckpointError: the file could not be written.
        """
        self.flush()
        return self._file.digest()

    def truncate(self, position: int) -> None:
        """Drops everything after byte `position`, a value that `flush` returned.

        Raises:
            CheckpointError: the file is shorter, or no row ends there.
        """
        size = self.flush()
        if size < position or (position > 0 and not _ends_a_row(self._path, position)):
            raise CheckpointError(
                f"expected a row that ends at byte {position} of {self._path}, found {size} bytes: "
                "the ledger was cut or changed since the checkpoint; restore it or start in a new "
                "output_dir"
            )
        self._file.truncate(position)

    def close(self) -> None:
        """Flushes and closes the file; closing twice is harmless.

        Raises:
            CheckpointError: the last rows could not be written; the file is closed all the same.
        """
        try:
            self._file.close()
        except OSError as err:
            raise _unwritable(self._path, err) from err


def cut_ledgers_of_gone_ranks(
    run_dir: Path | str, positions: Sequence[int], *, world_size: int
) -> dict[str, FileDigest]:
    """Truncates the rank files from `world_size` on to their positions in a checkpoint.

    Those without a position were begun after it and are removed. Called by one rank. Returns the
    digests of those that are left, by name.

    Raises:
        CheckpointError: a file is shorter than its position.
    """
    gone = {rank: path for rank, path in _rank_files(run_dir).items() if rank >= world_size}
    kept = {}
    for rank, path in gone.items():
        if rank >= len(positions):
            path.unlink()
        else:
            with closing(RankLedger(run_dir, rank)) as ledger:
                ledger.truncate(positions[rank])
                kept[ledger.name] = ledger.digest()
    return kept


def merge_ledgers(run_dir: Path | str, world_size: int) -> LedgerHead:
    """Merges all rank files into the chained `ledger.jsonl`; returns its head.

    Called by one rank after all have closed theirs. Memory does not grow with the number of rows.
    The rank files go only once the merged file is in place, so an interrupted call can be repeated;
    a call on a merged ledger changes nothing and returns the same head.

    Raises:
        LedgerError: a rank's file is missing, a line is no row, or rows are out of order.
        CheckpointError: the merged file cannot be written.
    """
    merged = Path(run_dir, MERGED_NAME)
    rank_files = _rank_files(run_dir)
    if merged.exists():
        head = _last(_chained_rows(merged))
    else:
        for rank in range(world_size):
            if rank not in rank_files:
                raise LedgerError(
                    f"expected {rank_path(run_dir, rank)} (rank {rank} of {world_size}), found no "
                    "file: restore it or resume from a checkpoint"
                )
        head = _write_chain(merged, rank_files.values())
    for path in rank_files.values():
        path.unlink()
    return head


def reopen_ledger(run_dir: Path | str) -> None:
    """Turns a merged ledger back into rank files, for a resumed run; else does nothing.

    Called by one rank before any `RankLedger` opens (a barrier is the caller's). The rank files are
    byte for byte what they were, so positions kept in checkpoints hold.

    Raises:
        LedgerError: the merged ledger's chain does not hold.
        CheckpointError: a rank file cannot be written.
    """
    merged = Path(run_dir, MERGED_NAME)
    if not merged.exists():
        return
    files: dict[int, IO[bytes]] = {}
    try:
        with ExitStack() as stack:
            for row, _ in _chained_rows(merged):
                rank = row["rank"]
                if rank not in files:
                    path = _temporary(rank_path(run_dir, rank))
                    files[rank] = stack.enter_context(path.open("wb"))
                files[rank].write(_canonical(row) + b"\n")
        for rank in files:
            path = rank_path(run_dir, rank)
            os.replace(_temporary(path), path)
    except OSError as err:
        raise _unwritable(merged, err) from err
    finally:
        for rank in files:
            _temporary(rank_path(run_dir, rank)).unlink(missing_ok=True)
    merged.unlink()


def verify_ledger(run_dir: Path | str, key: Key | None = None) -> LedgerHead:
    """Recomputes the chain of `ledger.jsonl` and returns its head, if it is that of `summary.json`.

    With a key the summary must be signed with it (`signing`).

    Raises:
        LedgerError: names the first bad line and what is wrong: a changed row, lost, added or
            reordered rows, a cut file, or a summary that is missing, silent on the ledger or not
            signed with the key.
    """
    wanted = _summary_head(Path(run_dir, "summary.json"), key)
    merged = Path(run_dir, MERGED_NAME)
    if not merged.is_file():
        raise LedgerError(
            f"cut file: expected {wanted.rows} rows in {merged}, found no file: {_RESTORE}"
        )
    found = _last(_chained_rows(merged, rows_wanted=wanted.rows))
    if found == wanted:
        return found
    if found.rows == wanted.rows:
        kind = f"changed row: head {found.head[:12]}, but {wanted.head[:12]}"
    else:
        kind = "cut file" if found.rows < wanted.rows else "added rows"
        kind += f": {found.rows} rows, but {wanted.rows}"
    raise LedgerError(f"{merged}:{found.rows}: {kind} in summary.json: {_RESTORE}")


# ---- rows and their one text -------------------------------------------------------------------

_RESTORE = "restore the file from a copy"


def _plain(row: "LedgerRow") -> _Json:
    """The row as plain numbers and text, also where it came with NumPy or torch scalars."""
    plain = asdict(row)
    for name in _ORDER:
        plain[name] = int(plain[name])
    for name in ("risk", "kl_coef", "divergence"):
        plain[name] = _number(plain[name])
    if plain["note"] is None:
        del plain["note"]
    return plain


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they become text that `float` reads back."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _canonical(row: _Json) -> bytes:
    """The one text of a row: sorted keys, no spaces, ASCII, shortest floats that round-trip."""
    return json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _parse(line: bytes) -> tuple[_Key, _Json] | None:
    """(key, row) of a line that is the canonical text of a row with a whole-number key."""
    try:
        row = json.loads(line)
        key = tuple(row[name] for name in _ORDER)
        is_exact = _canonical(row) + b"\n" == line
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (key, row) if is_exact and all(type(part) is int for part in key) else None


def _lines(path: Path) -> Iterator[tuple[str, _Key, _Json]]:
    """(`file:line`, key, row) of each line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            parsed = _parse(line)
            if parsed is None:
                kind = "changed row" if line.endswith(b"\n") else "cut file: incomplete line"
                raise LedgerError(f"{path}:{number}: {kind}, not a row as written: {_RESTORE}")
            yield f"{path}:{number}", *parsed


# ---- files -------------------------------------------------------------------------------------


def rank_path(run_dir: Path | str, rank: int) -> Path:
    """The file that a rank appends its rows to."""
    return Path(run_dir, f"ledger.rank{rank}.jsonl")


def _rank_files(run_dir: Path | str) -> dict[int, Path]:
    """Rank -> file, for all rank files of the folder, also those of an earlier world size."""
    matches = ((_RANK_FILE.fullmatch(path.name), path) for path in Path(run_dir).iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _ends_a_row(path: Path, position: int) -> bool:
    with path.open("rb") as file:
        file.seek(position - 1)
        return file.read(1) == b"\n"


def _unwritable(path: Path, err: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write the ledger {path}: {err.strerror}: free space, resume")


def _increasing(path: Path) -> Iterator[tuple[_Key, _Json]]:
    """The rows of a rank file, which must come in increasing order."""
    previous: _Key = ()
    for where, key, row in _lines(path):
        if key <= previous:
            raise LedgerError(
                f"{where}: reordered rows: {_ORDER} = {key} comes after {previous}: on a resume "
                "truncate the file to the checkpoint's position first"
            )
        previous = key
        yield key, row


def _write_chain(merged: Path, rank_files: Iterable[Path]) -> LedgerHead:
    """Writes the merged file to a temporary sibling and moves it into place."""
    head = LedgerHead(GENESIS, 0)
    streams = [_increasing(path) for path in rank_files]
    temporary = _temporary(merged)
    try:
        with temporary.open("wb") as file:
            for _, row in heapq.merge(*streams, key=lambda item: item[0]):
                head = head.followed_by(row)
                file.write(_canonical({**row, "hash": head.head}) + b"\n")
            file.flush()
            os.fsync(file.fileno())  # the rank files are deleted on the strength of this one
        os.replace(temporary, merged)
    except OSError as err:
        raise _unwritable(merged, err) from err
    finally:
        temporary.unlink(missing_ok=True)
    return head


def _chained_rows(
    merged: Path, *, rows_wanted: int | None = None
) -> Iterator[tuple[_Json, LedgerHead]]:
    """(row without its hash, head up to it) of each line, as far as the chain holds."""
    head = LedgerHead(GENESIS, 0)
    for where, _, row in _lines(merged):
        stated = row.pop("hash", None)
        head = head.followed_by(row)
        if head.head != stated:
            kind = _likely_kind(merged, rows_wanted)
            raise LedgerError(
                f"{where}: {kind}: its hash does not follow from the line before: {_RESTORE}"
            )
        yield row, head


def _likely_kind(merged: Path, rows_wanted: int | None) -> str:
    """The likeliest cause of a broken chain, as a hint for the message."""
    with merged.open("rb") as file:
        keys = [parsed[0] for parsed in map(_parse, file) if parsed]
    if keys != sorted(set(keys)):
        return "reordered rows"
    if rows_wanted is None or len(keys) == rows_wanted:
        return "changed row"
    return "lost rows" if len(keys) < rows_wanted else "added rows"


def _last(rows: Iterator[tuple[_Json, LedgerHead]]) -> LedgerHead:
    tail = deque(rows, maxlen=1)
    return tail[0][1] if tail else LedgerHead(GENESIS, 0)


def _why_none(summary: Path) -> str:
    """What to do where there is no summary."""
    folder = summary.parent
    if not folder.is_dir():
        return f"expected the folder of a run, found none at {folder}: check the path"
    if (folder / MERGED_NAME).exists():
        return f"missing summary: expected it in {summary}, found no file: {_RESTORE}"
    if any(folder.glob("ledger.rank*.jsonl")):
        return (
            f"the run in {folder} has not ended: its ledger becomes a chain, with a head in "
            "summary.json, at its end; let it go on, and verify it then"
        )
    return f"expected a ledger in {folder}, found none: give the output_dir of a run"


def _summary_head(path: Path, key: Key | None) -> LedgerHead:
    """The ledger's head in `summary.json`."""
    try:
        content = path.read_bytes()
        if key is not None and (wrong := what_is_wrong(path, content, key)):
            raise LedgerError(f"{wrong}: do not rely on this ledger, or give the key of the run")
        ledger = parse_json(content)["ledger"]
        head, rows = ledger["head"], ledger["rows"]
        if not isinstance(head, str) or not isinstance(rows, int):
            raise TypeError("head is a text, rows a number")
    except NotADirectoryError as err:
        raise LedgerError(
            f"expected the folder of a run, got the file {path.parent}: give the folder it is in"
        ) from err
    except FileNotFoundError as err:
        raise LedgerError(_why_none(path)) from err
    except (ValueError, KeyError, TypeError) as err:
        raise LedgerError(
            f'missing summary: expected "ledger": {{"head", "rows"}} in {path}, found none or no '
            f"JSON: {_RESTORE}"
        ) from err
    return LedgerHead(head, rows)
