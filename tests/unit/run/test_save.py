"""Claimed: with `train.async_save` a save returns while its files are still being copied, nothing
is seen of the checkpoint before all of it is there, and it then holds the same bytes as one that
was written at once. What ends a copy, or a part that never comes, is an error of all ranks. Exact,
on two ranks; the files that take long are pipes. Kills: tests/distributed/test_async_save.py.
"""

import os
import resource
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support.ranks import ALONE, on_ranks
from support.saves import Engine, Regularizer, state

from safereg_dist.config import load_config
from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.run import save
from safereg_dist.run.checkpoint import read_state, saved_checkpoints
from safereg_dist.run.manifest import first_changed, read_manifest
from safereg_dist.run.save import Saver
from safereg_dist.run.staging import staging_folder
from safereg_dist.storage.digests import FileDigest


class RankEngine(Engine):
    """Writes a file of each rank; rank 1's second one is a pipe, which is read when it is fed."""

    def __init__(self, rank, *, holds=False):
        super().__init__(rank)
        self.rank, self.holds = rank, holds

    def save(self, folder):
        """Below a folder that all may share."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{self.rank}.bin").write_bytes(bytes([self.rank]) * 3_000_000)
        if self.rank == 1 and self.holds:
            self.pipe = folder / "slow.rank1.bin"
            os.mkfifo(self.pipe)

    def let_go(self):
        """Feeds the pipe."""
        if self.rank == 1 and self.holds:
            self.pipe.write_bytes(b"at last")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata: {train: t.jsonl}\nrisk: {estimator: column}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    return load_config(path)


def saver_of(folder, ranks, engine, *, is_async=True, **how):
    staging = staging_folder(str(folder / "local"), folder, ranks) if is_async else None
    return Saver(
        folder / "checkpoint",
        engine=engine,
        regularizer=Regularizer(0.5),
        ranks=ranks,
        keep=2,
        staging=staging,
        **how,
    )


def saved(folder):
    return [path.name for path in saved_checkpoints(folder / "checkpoint")]


def said_by(block):
    """The message of the CheckpointError of a block; empty where it has none."""
    try:
        block()
    except CheckpointError as err:
        return str(err)
    return ""


def test_a_checkpoint_is_seen_when_all_of_it_is_there(config, tmp_path):
    def work(ranks):
        engine, seen = RankEngine(ranks.rank, holds=True), []
        logs = {f"ledger.rank{ranks.rank}.jsonl": FileDigest(0, "")}
        with saver_of(tmp_path, ranks, engine) as saver:
            saver.save(state(config, 3), logs=logs, key=None)
            blocked = saver.blocked()
            ranks.raise_together(None)
            seen.append(saved(tmp_path))
            engine.let_go()
            saver.wait()
            ranks.raise_together(None)
            seen.append(saved(tmp_path))
            counts = (saver.saves, 0 < blocked <= saver.blocked_seconds, saver.seconds > 0)
            left = len(list((tmp_path / "local").rglob("*.bin")))
            ranks.raise_together(None)  # leaving the block removes a rank's folder
        return [seen, counts, left]

    for seen, counts, left in on_ranks(2, work, tmp_path):
        assert seen == [[], ["step-00000003"]]
        assert counts == [1, True, True]
        assert left == 0
    whole = tmp_path / "checkpoint" / "step-00000003"
    manifest = read_manifest(whole, None)
    assert first_changed(whole, manifest.files, manifest.files) is None
    expected = {"rank0.bin", "rank1.bin", "slow.rank1.bin"}
    assert {Path(name).name for name in manifest.files if "engine/" in name} == expected
    assert set(manifest.logs) == {"ledger.rank0.jsonl", "ledger.rank1.jsonl"}
    assert not list((tmp_path / "checkpoint").glob(".*"))
    assert not list((tmp_path / "local").iterdir())


def test_it_is_what_a_save_at_once_writes(config, tmp_path):
    def work(ranks):
        for kind in ("at once", "async"):
            with saver_of(
                tmp_path / kind, ranks, RankEngine(ranks.rank), is_async=kind == "async"
            ) as s:
                for step in (1, 2, 3):
                    s.save(state(config, step), logs={}, key=None)
                s.wait()

    on_ranks(2, work, tmp_path)
    files = {}
    for kind in ("at once", "async"):
        assert saved(tmp_path / kind) == ["step-00000002", "step-00000003"]
        whole = tmp_path / kind / "checkpoint" / "step-00000003"
        files[kind] = dict(read_manifest(whole, None).files)
        del files[kind]["state.json"]  # it says how long saving took
        assert read_state(whole).saves == 2
    assert files["async"] == files["at once"]


def test_what_ends_a_copy_is_known_to_all_ranks(config, tmp_path):
    """Rank 1 finds its file's place taken: it goes on training, and all raise at the next flags."""

    def work(ranks):
        engine = RankEngine(ranks.rank, holds=True)
        with suppress(CheckpointError), saver_of(tmp_path, ranks, engine) as saver:
            saver.save(state(config, 3), logs={}, key=None)
            if ranks.rank == 1:
                [partial] = (tmp_path / "checkpoint").glob(".step-00000003.*.partial")
                (partial / "rank1.safetensors").touch()
            engine.let_go()
            while ranks.rank == 1 and saver.error is None:
                time.sleep(0.01)
            found = [said_by(lambda: ranks.raise_together(saver.error)), said_by(saver.wait)]
            raise CheckpointError("the run ends")
        return found

    for found in on_ranks(2, work, tmp_path):
        for text in found:
            assert "expected to write a checkpoint" in text
            assert "File exists" in text
    assert not list((tmp_path / "checkpoint").iterdir())


def test_a_part_that_never_comes_is_named(config, tmp_path):
    def work(ranks):
        with saver_of(tmp_path, ranks, RankEngine(ranks.rank, holds=True), timeout_s=0.5) as saver:
            saver.save(state(config, 3), logs={}, key=None)
            found = said_by(lambda: saver.save(state(config, 4), logs={}, key=None))
        return found

    for found in on_ranks(2, work, tmp_path):
        assert "within 0 s (engine.timeout_s), that of rank1 never came" in found
    assert not list((tmp_path / "checkpoint").iterdir())


def test_a_system_that_ranks_no_threads_saves_all_the_same(config, tmp_path, monkeypatch):
    """An error before the thread's first file would look like its end."""

    def refuse(*_):
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(os, "setpriority", refuse)
    with saver_of(tmp_path, ALONE, RankEngine(0)) as saver:
        saver.save(state(config, 2), logs={}, key=None)
        saver.wait()
    assert saved(tmp_path) == ["step-00000002"]


class SlowKey:
    """A key that takes its time, as a disk that stalls under the manifest."""

    name = "slow"

    def __init__(self):
        self.asked, self.go_on = threading.Event(), threading.Event()

    def sign(self, content):
        """When it may."""
        self.asked.set()
        self.go_on.wait(20)
        return b"signed"


def test_what_a_run_gives_up_is_never_published_in_part(config, tmp_path, monkeypatch):
    """The run ends while its thread is between the last part and the rename, and older ones go."""
    monkeypatch.setattr(save, "_LET_GO_S", 0.1)
    key, made = SlowKey(), saver_of(tmp_path, ALONE, RankEngine(0))
    made._keep = 1
    with suppress(KeyboardInterrupt), made:
        made.save(state(config, 2), logs={}, key=None)
        made.wait()
        made.save(state(config, 3), logs={}, key=key)
        assert key.asked.wait(20)
        raise KeyboardInterrupt
    key.go_on.set()
    made._thread.join(20)
    assert made.error is None
    assert saved(tmp_path) == ["step-00000003"]
    whole = tmp_path / "checkpoint" / "step-00000003"
    files = read_manifest(whole, None).files
    assert first_changed(whole, files, files) is None


class FillingEngine(RankEngine):
    """Once rank 1 has written its snapshot, files of 1 MB fill the disk (a limit of the system)."""

    fills = False

    def save(self, folder):
        super().save(folder)
        if self.rank == 1 and self.fills:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_the_disk_fills_while_a_thread_copies(config, tmp_path):
    """Earlier checkpoints stay, and nothing else."""

    def work(ranks):
        engine = FillingEngine(ranks.rank)
        with suppress(CheckpointError), saver_of(tmp_path, ranks, engine) as saver:
            saver.save(state(config, 1), logs={}, key=None)
            saver.wait()
            engine.fills = True
            saver.save(state(config, 3), logs={}, key=None)
            found = said_by(saver.wait)
            raise CheckpointError("the run ends")
        return found

    for found in on_ranks(2, work, tmp_path):
        assert "File too large: free disk space, and go on from the newest checkpoint" in found
    assert os.listdir(tmp_path / "checkpoint") == ["step-00000001"]


def test_a_copy_that_somebody_keeps_beside_is_not_removed(config, tmp_path):
    with saver_of(tmp_path, ALONE, Engine(), is_async=False) as saver:
        for step in (1, 2, 3, 4):
            saver.save(state(config, step), logs={}, key=None)
            kept = tmp_path / "checkpoint" / f"step-{step:08d}"
            if step == 1:
                shutil.copytree(kept, kept.with_name(f"{kept.name}-kept"))
    names = ["step-00000001-kept", "step-00000003", "step-00000004"]
    assert sorted(os.listdir(tmp_path / "checkpoint")) == names
    assert saved(tmp_path) == names[1:]


def test_staging_holds_what_its_owner_alone_may_see(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    folder = staging_folder(str(tmp_path / "local"), run, ALONE)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "left by a kill").touch()
    of_other = staging_folder(str(tmp_path / "local"), other, ALONE)
    assert staging_folder(str(tmp_path / "local"), run, ALONE) == folder
    assert not list(folder.iterdir())
    folder.rmdir()
    folder.symlink_to(of_other)
    with pytest.raises(ConfigError, match=r"not a folder of this user's: set train\.save_"):
        staging_folder(str(tmp_path / "local"), run, ALONE)
    assert of_other.is_dir()


def test_staging_without_async_save_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: t.jsonl}\nrisk: {estimator: column}\n")
    with pytest.raises(ConfigError, match="save_staging is where asynchronous saves begin"):
        load_config(path, ["train.save_staging=/tmp"])
    load_config(path, ["train.save_staging=/tmp", "train.async_save=true"])
