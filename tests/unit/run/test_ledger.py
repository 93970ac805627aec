"""The ledger: rows in, one chained file out, and no change to it goes unseen.

Claimed: any merge order gives one file; any single changed byte, deleted, swapped, doubled or
inserted line, and any cut is found and the first bad line named; positions make a resumed run's
rank files equal byte for byte. Everything here is exact.
"""

import errno
import hashlib
import json
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safereg_dist.errors import CheckpointError, LedgerError
from safereg_dist.run import ledger
from safereg_dist.run.ledger import (
    LedgerHead,
    RankLedger,
    cut_ledgers_of_gone_ranks,
    merge_ledgers,
    reopen_ledger,
    verify_ledger,
)
from safereg_dist.types import LedgerRow

in_place = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make_row(step: int, micro_batch: int, rank: int, row: int, **changes: Any) -> LedgerRow:
    rng = random.Random(f"{step} {micro_batch} {rank} {row}")
    values: dict[str, Any] = {
        "id": f"row-{rng.randrange(1000)}",
        "risk": rng.random(),
        "estimator": "probe:reference",
        "kl_coef": rng.choice([0.0, 0.3, 1.0]),
        "divergence": rng.choice([None, rng.random()]),
    }
    return LedgerRow(step=step, micro_batch=micro_batch, rank=rank, row=row, **(values | changes))


def write_ranks(folder: Path, *, world_size: int = 2, steps: int = 3) -> None:
    for rank in range(world_size):
        rank_ledger = RankLedger(folder, rank)
        for step in range(steps):
            for micro_batch in range(2):
                for row in range(1 + (step + rank) % 2):
                    rank_ledger.append(make_row(step, micro_batch, rank, row))
        rank_ledger.close()


def finish(folder: Path, world_size: int = 2) -> LedgerHead:
    head = merge_ledgers(folder, world_size)
    summary = {"ledger": {"head": head.head, "rows": head.rows}, "steps": 3}
    (folder / "summary.json").write_text(json.dumps(summary))
    return head


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_ranks(tmp_path)
    finish(tmp_path)
    return tmp_path


def test_chain_by_hand(run: Path) -> None:
    head = hashlib.sha256(b"safereg-dist ledger format 1").hexdigest()
    keys = []
    for line in lines_of(run):
        row = json.loads(line)
        stated = row.pop("hash")
        text = json.dumps(row, sort_keys=True, separators=(",", ":"))
        head = hashlib.sha256((head + text).encode()).hexdigest()
        assert stated == head
        keys.append((row["step"], row["micro_batch"], row["rank"], row["row"]))
        assert LedgerRow(**row) == make_row(*keys[-1])
    assert keys == sorted(keys)
    assert verify_ledger(run) == LedgerHead(head, len(keys))
    assert len(keys) == 18
    assert sorted(path.name for path in run.iterdir()) == ["ledger.jsonl", "summary.json"]


def test_merging_twice_changes_nothing(run: Path) -> None:
    before = (run / "ledger.jsonl").read_bytes()
    assert merge_ledgers(run, 2) == verify_ledger(run)
    assert (run / "ledger.jsonl").read_bytes() == before


def test_an_interrupted_merge_is_completed(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    leftover = (tmp_path / "ledger.rank1.jsonl").read_bytes()
    head = finish(tmp_path)
    (tmp_path / "ledger.rank1.jsonl").write_bytes(leftover)  # died between the two deletions
    assert merge_ledgers(tmp_path, 2) == head == verify_ledger(tmp_path)
    assert not list(tmp_path.glob("ledger.rank*"))


# ---- what verify finds -------------------------------------------------------------------------


@in_place
@given(data=st.data())
def test_any_changed_byte_is_found(run: Path, data: st.DataObject) -> None:
    original = (run / "ledger.jsonl").read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != original[place]))
    bad_line = original[:place].count(b"\n") + 1
    try:
        changed = original[:place] + bytes([byte]) + original[place + 1 :]
        (run / "ledger.jsonl").write_bytes(changed)
        with pytest.raises(LedgerError, match=rf"jsonl:{bad_line}: "):
            verify_ledger(run)
    finally:
        (run / "ledger.jsonl").write_bytes(original)


@in_place
@given(data=st.data())
def test_any_cut_is_found(run: Path, data: st.DataObject) -> None:
    original = (run / "ledger.jsonl").read_bytes()
    length = data.draw(st.integers(0, len(original) - 1))
    try:
        (run / "ledger.jsonl").write_bytes(original[:length])
        with pytest.raises(LedgerError, match="cut file"):
            verify_ledger(run)
    finally:
        (run / "ledger.jsonl").write_bytes(original)


@in_place
@given(data=st.data())
def test_any_edit_of_lines_is_found(run: Path, data: st.DataObject) -> None:
    lines = lines_of(run)
    index = st.integers(0, len(lines) - 1)
    first, second = sorted(data.draw(st.tuples(index, index).filter(lambda p: p[0] != p[1])))
    edit = data.draw(st.sampled_from(["delete", "swap", "double"]))
    edited = list(lines)
    if edit == "delete":
        del edited[first]
        kind, line = ("lost rows", first + 1)
    elif edit == "swap":
        edited[first], edited[second] = edited[second], edited[first]
        kind, line = ("reordered rows", first + 1)
    else:
        edited.insert(second, edited[first])
        kind, line = ("reordered rows", second + 1)
    try:
        (run / "ledger.jsonl").write_bytes(b"".join(edited))
        with pytest.raises(LedgerError, match=f"jsonl:{line}: {kind}"):
            verify_ledger(run)
    finally:
        (run / "ledger.jsonl").write_bytes(b"".join(lines))


def test_a_changed_value_names_its_line(run: Path) -> None:
    lines = lines_of(run)
    row = json.loads(lines[6])
    row["kl_coef"] = 0.25
    lines[6] = json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    (run / "ledger.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=r"ledger.jsonl:7: changed row: its hash"):
        verify_ledger(run)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"micro_batch":0,"rank":0,"row":0,"step":9}\n', "added rows"),
        (b"\n", "changed row, not a row"),
        (b"[1]\n", "changed row, not a row"),
        (b"\xff\n", "changed row, not a row"),
        (b'{"step":', "cut file: incomplete line"),
        (b'{"micro_batch":0,"rank":0,"row":0,"step":true}\n', "changed row, not a row"),
        (b"[" * 100_000 + b"\n", "changed row, not a row"),
    ],
)
def test_lines_that_were_appended(run: Path, line: bytes, kind: str) -> None:
    with (run / "ledger.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(LedgerError, match=f"ledger.jsonl:19: {kind}"):
        verify_ledger(run)


def test_a_forged_chain_is_held_against_the_summary(run: Path, tmp_path_factory) -> None:
    """A whole new chain over changed rows verifies only with a new summary."""
    other = tmp_path_factory.mktemp("forged")
    write_ranks(other, steps=4)
    merge_ledgers(other, 2)
    (run / "ledger.jsonl").write_bytes((other / "ledger.jsonl").read_bytes())
    with pytest.raises(LedgerError, match="added rows: 24 rows, but 18 in summary"):
        verify_ledger(run)
    (run / "ledger.jsonl").write_bytes(b"".join(lines_of(other)[:18]))
    assert verify_ledger(run).rows == 18  # the true prefix: the chain is deterministic
    summary = json.loads((run / "summary.json").read_text())
    summary["ledger"]["head"] = "0" * 64
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(LedgerError, match=r"jsonl:18: changed row: head .* but 000000000000"):
        verify_ledger(run)


@pytest.mark.parametrize("text", [None, "{}", "[]", "", '{"ledger": {"rows": 3}}'])
def test_missing_summary(run: Path, text: str | None) -> None:
    (run / "summary.json").unlink()
    if text is not None:
        (run / "summary.json").write_text(text)
    with pytest.raises(LedgerError, match="missing summary"):
        verify_ledger(run)


def test_folders_without_a_chain(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="expected the folder of a run, found none at"):
        verify_ledger(tmp_path / "typo")
    with pytest.raises(LedgerError, match=r"expected a ledger in .*, found none: give the output"):
        verify_ledger(tmp_path)
    (tmp_path / "ledger.rank0.jsonl").touch()
    with pytest.raises(LedgerError, match="has not ended: its ledger becomes a chain"):
        verify_ledger(tmp_path)


def test_missing_ledger(run: Path) -> None:
    (run / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match=r"cut file: expected 18 rows .* found no file"):
        verify_ledger(run)


# ---- rows --------------------------------------------------------------------------------------


def write_one(folder: Path, row: LedgerRow) -> dict:
    rank_ledger = RankLedger(folder, 0)
    rank_ledger.append(row)
    rank_ledger.close()
    finish(folder, 1)
    verify_ledger(folder)
    return json.loads((folder / "ledger.jsonl").read_bytes())


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.characters(codec=None)),
    numbers=st.tuples(st.floats(), st.floats(), st.floats() | st.none()),
)
def test_every_id_and_float_survives(tmp_path_factory, text: str, numbers: tuple) -> None:
    """Unicode of any kind (line separators, lone surrogates), NaN and infinities."""
    risk, kl_coef, divergence = numbers
    row = write_one(
        tmp_path_factory.mktemp("row"),
        make_row(0, 0, 0, 0, id=text, risk=risk, kl_coef=kl_coef, divergence=divergence),
    )
    assert row["id"] == text
    for name, value in (("risk", risk), ("kl_coef", kl_coef)):
        assert float(row[name]) == value or np.isnan(value)
    assert (row["divergence"] is None) == (divergence is None)


def test_non_finite_floats_become_text(tmp_path: Path) -> None:
    row = write_one(
        tmp_path, make_row(0, 0, 0, 0, risk=None, kl_coef=float("nan"), divergence=-float("inf"))
    )
    assert (row["risk"], row["kl_coef"], row["divergence"]) == (None, "nan", "-inf")


def test_scalars_of_other_libraries(tmp_path: Path) -> None:
    row = write_one(
        tmp_path, make_row(0, 0, 0, 0, risk=np.float32(0.5), kl_coef=1, divergence=np.float64(2))
    )
    assert (row["risk"], row["kl_coef"], row["divergence"]) == (0.5, 1.0, 2.0)
    assert b'"kl_coef":1.0,' in (tmp_path / "ledger.jsonl").read_bytes()


# ---- merging -----------------------------------------------------------------------------------


def test_empty_ledgers(tmp_path: Path) -> None:
    for rank in range(3):
        RankLedger(tmp_path, rank).close()
    assert finish(tmp_path, 3) == LedgerHead(ledger.GENESIS, 0) == verify_ledger(tmp_path)
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


def test_a_rank_without_rows(tmp_path: Path) -> None:
    write_ranks(tmp_path, world_size=1)
    RankLedger(tmp_path, 1).close()
    assert finish(tmp_path, 2).rows == 8


def test_ranks_beyond_nine_are_ordered_as_numbers(tmp_path: Path) -> None:
    write_ranks(tmp_path, world_size=12, steps=1)
    finish(tmp_path, 12)
    ranks = [json.loads(line)["rank"] for line in lines_of(tmp_path)]
    assert ranks[:18] == sorted(ranks[:18])
    assert verify_ledger(tmp_path).rows == 36


def test_ranks_of_an_earlier_world_size_are_kept(tmp_path: Path) -> None:
    write_ranks(tmp_path, world_size=3)
    assert finish(tmp_path, 2).rows == 26


def test_another_number_of_ranks_is_told_and_chained(tmp_path: Path) -> None:
    """4 ranks, then 2 that begin again at step 1, after an attempt of 6 that left files behind."""
    write_ranks(tmp_path, world_size=6, steps=2)
    ends = []
    for rank in range(4):
        with closing(RankLedger(tmp_path, rank)) as ledger_of_rank:
            rows = (tmp_path / f"ledger.rank{rank}.jsonl").read_bytes().splitlines(keepends=True)
            ends.append(sum(len(row) for row in rows if b'"step":0' in row))
            if rank < 2:
                ledger_of_rank.truncate(ends[rank])
    cut_ledgers_of_gone_ranks(tmp_path, ends, world_size=2)
    for rank in range(2):
        with closing(RankLedger(tmp_path, rank)) as ledger_of_rank:
            if rank == 0:
                ledger_of_rank.append_change(1, 4, 2)
            ledger_of_rank.append(make_row(1, 0, rank, 0))
    head = finish(tmp_path)
    assert head.rank_changes == verify_ledger(tmp_path).rank_changes == ((1, 4, 2),)
    found = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_bytes().splitlines()]
    assert {row["rank"] for row in found if row["step"] == 0} == {0, 1, 2, 3}
    (place,) = [i for i, row in enumerate(found) if "ranks" in row]
    assert [row["step"] for row in found] == [0] * place + [1] * (len(found) - place)
    text = (tmp_path / "ledger.jsonl").read_text().replace('"ranks":[4,2]', '"ranks":[4,3]')
    (tmp_path / "ledger.jsonl").write_text(text)
    with pytest.raises(LedgerError, match="changed row"):
        verify_ledger(tmp_path)


def test_a_gone_ranks_ledger_that_was_cut_is_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path, world_size=2)
    with pytest.raises(CheckpointError, match="rank1"):
        cut_ledgers_of_gone_ranks(tmp_path, [0, 10**6], world_size=1)


def test_a_missing_rank_is_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path, world_size=1)
    with pytest.raises(LedgerError, match=r"rank1.jsonl \(rank 1 of 2\), found no file"):
        merge_ledgers(tmp_path, 2)
    assert (tmp_path / "ledger.rank0.jsonl").exists()
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (b'{"divergence":null', "rank1.jsonl:10: cut file"),
        (b'{"a": 1}\n', "rank1.jsonl:10: changed row"),
    ],
)
def test_a_broken_rank_file_leaves_no_merged_file(
    tmp_path: Path, tail: bytes, message: str
) -> None:
    write_ranks(tmp_path)
    path = tmp_path / "ledger.rank1.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:9]) + tail)
    with pytest.raises(LedgerError, match=message):
        merge_ledgers(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ledger.rank0.jsonl",
        "ledger.rank1.jsonl",
    ]


def test_steps_that_were_run_twice_are_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    write_ranks(tmp_path)  # a resume that forgot to truncate
    with pytest.raises(LedgerError, match=r"reordered rows.*truncate"):
        merge_ledgers(tmp_path, 2)


def test_a_row_that_was_written_twice_is_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    path = tmp_path / "ledger.rank1.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:4], *rows[3:]]))
    with pytest.raises(LedgerError, match=r"rank1.jsonl:5: reordered rows"):
        merge_ledgers(tmp_path, 2)


# ---- resume ------------------------------------------------------------------------------------


def test_truncate_and_go_on_gives_the_same_bytes(tmp_path: Path) -> None:
    def rows(steps: range) -> list[LedgerRow]:
        return [make_row(step, 0, 0, row) for step in steps for row in range(3)]

    whole = RankLedger(tmp_path, 0)
    for row in rows(range(6)):
        whole.append(row)
    whole.close()
    resumed = RankLedger(tmp_path, 1)
    for row in rows(range(4)):
        resumed.append(row)
    position = resumed.flush()
    for row in rows(range(4, 5)):
        resumed.append(row)
    resumed.close()
    with (tmp_path / "ledger.rank1.jsonl").open("ab") as file:
        file.write(b'{"divergence":0.1')  # killed in the middle of a write
    resumed = RankLedger(tmp_path, 1)
    resumed.truncate(position)
    for row in rows(range(4, 6)):
        resumed.append(row)
    resumed.close()
    resumed.close()
    first, second = ((tmp_path / f"ledger.rank{rank}.jsonl").read_bytes() for rank in (0, 1))
    assert first == second
    again = RankLedger(tmp_path, 0)
    assert len(first) == again.flush()
    again.close()


@pytest.mark.parametrize("delta", [1, 1000, -1])
def test_truncate_refuses_a_place_that_is_no_rows_end(tmp_path: Path, delta: int) -> None:
    rank_ledger = RankLedger(tmp_path, 0)
    rank_ledger.append(make_row(0, 0, 0, 0))
    position = rank_ledger.flush()
    with pytest.raises(
        CheckpointError, match=f"ends at byte {position + delta} .*{position} bytes"
    ):
        rank_ledger.truncate(position + delta)
    rank_ledger.truncate(0)
    assert rank_ledger.flush() == 0
    rank_ledger.close()


def test_reopening_restores_the_rank_files(tmp_path: Path) -> None:
    write_ranks(tmp_path, world_size=3)
    names = [f"ledger.rank{rank}.jsonl" for rank in range(3)]
    before = [(tmp_path / name).read_bytes() for name in names]
    head = finish(tmp_path, 3)
    with pytest.raises(LedgerError, match="finished one"):
        RankLedger(tmp_path, 0)
    reopen_ledger(tmp_path)
    reopen_ledger(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "summary.json"]
    assert finish(tmp_path, 3) == head


def test_reopening_refuses_a_broken_chain(run: Path) -> None:
    (run / "ledger.jsonl").write_bytes(b"".join(lines_of(run)[1:]))
    with pytest.raises(LedgerError, match="jsonl:1: "):
        reopen_ledger(run)
    assert sorted(path.name for path in run.iterdir()) == ["ledger.jsonl", "summary.json"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """/dev/full fails each write with ENOSPC, as a full disk does."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "ledger.rank0.jsonl").symlink_to(full)
    rank_ledger = RankLedger(tmp_path, 0)
    rank_ledger.append(make_row(0, 0, 0, 0))
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        rank_ledger.flush()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    with pytest.raises(CheckpointError, match="No space left on device"):
        rank_ledger.close()
    rank_ledger.close()
