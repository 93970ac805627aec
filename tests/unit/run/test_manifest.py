"""Claimed: every changed bit of a manifest is found, and every file of a checkpoint is digested by
one rank and checked by one that reads it, on any number of ranks.

Exact.
"""

import pytest

from safereg_dist.errors import CheckpointError
from safereg_dist.run.manifest import (
    Manifest,
    files_of_rank,
    own_digests,
    read_manifest,
    write_manifest,
)
from safereg_dist.storage.digests import AppendedFile, FileDigest, digest_of

SHARED = ("engine/engine/mp_rank_00_model_states.pt", "engine/.metadata", "state.json")
OF_RANK = {
    "rank0.safetensors": 0,
    "risk1.safetensors": 1,
    "risk12-self-harm.safetensors": 12,
    "engine/__3_0.distcp": 3,
    "engine/engine/zero_pp_rank_2_mp_rank_00_model_states.pt": 2,
    "engine/engine/bf16_zero_pp_rank_10_mp_rank_00_optim_states.pt": 10,
}


@pytest.fixture
def folder(tmp_path):
    for name in (*SHARED, *OF_RANK):
        path = tmp_path / "step-00000007" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "step-00000007"


@pytest.mark.parametrize("world_size", [1, 2, 3, 13])
def test_each_file_is_read_by_a_rank_on_any_number_of_ranks(folder, world_size):
    names = (*SHARED, *OF_RANK)
    written, read = {}, []
    for rank in range(world_size):
        own = own_digests(folder, rank, world_size)
        assert not written.keys() & own.keys()
        written.update(own)
        read.append(set(files_of_rank(names, rank, world_size)))
        assert set(SHARED) <= read[-1]
    assert written == {name: digest_of(folder / name) for name in names}
    assert set().union(*read) == set(names)
    if world_size == 13:
        for name, rank in OF_RANK.items():
            assert [r for r, mine in enumerate(read) if name in mine] == [rank]


def test_each_flipped_bit_of_a_manifest_is_found():
    digest = FileDigest(5, "0" * 64)
    content = Manifest(7, {"state.json": digest}, {"metrics.jsonl": digest}).to_bytes()
    assert Manifest.from_bytes(content).files == {"state.json": digest}
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):  # noqa: PT011 - which of them is no matter
            Manifest.from_bytes(bytes(changed))


def test_lost_and_added_files_and_those_of_another_step_are_found(folder):
    write_manifest(folder, Manifest(7, own_digests(folder, 0, 1), {}), None)
    assert read_manifest(folder, None).step == 7
    (folder / "engine" / "more.pt").symlink_to(folder / "state.json")
    with pytest.raises(ValueError, match=r"engine/more\.pt is not in the manifest"):
        read_manifest(folder, None)
    (folder / "engine" / "more.pt").unlink()
    (folder / "state.json").unlink()
    with pytest.raises(ValueError, match=r"state\.json is missing"):
        read_manifest(folder, None)
    (folder / "state.json").write_text("state.json")
    with pytest.raises(ValueError, match="is of step 7"):
        read_manifest(folder.rename(folder.with_name("step-00000009")), None)


def test_a_folder_that_rank_0_does_not_see_whole_gets_no_manifest(folder):
    """As where output_dir is another disk on each host."""
    with pytest.raises(CheckpointError, match="one folder for all hosts"):
        write_manifest(folder, Manifest(7, {"rank9.safetensors": FileDigest(0, "")}, {}), None)
    assert not (folder / "manifest.json").exists()


def test_the_running_digest_is_that_of_the_file(tmp_path):
    """Opened anew, cut back and written on."""
    path = tmp_path / "log"
    for text, cut in ((b"one", 3), (b"two", 4), (b"three", 1)):
        file = AppendedFile(path)
        file.write(text)
        assert file.digest() == digest_of(path)
        file.truncate(cut)
        file.write(b"!")
        assert file.digest() == digest_of(path)
        file.close()
    assert path.read_bytes() == b"o!"
