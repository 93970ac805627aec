"""Claimed: a pickle in a checkpoint runs nothing, whatever it asks for, and is refused by the name
of its file and of what it asks for; tensors and plain values are read as torch reads them.

Exact. Real files; a hostile one would make a marker file.
"""

import io
import os
import pickle

import pytest
import torch
from torch.distributed import checkpoint as shared

from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.pickles import check_file, load_tensors, only_tensors, read_metadata


class Hostile:
    """Unpickled as it asks to be, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def written(path, how, value):
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps(value, protocol=int(how[-1])))
    else:
        content = io.BytesIO()  # torch writes no zip of the name .metadata
        torch.save({"a": [value]}, content, _use_new_zipfile_serialization=how == "zip")
        path.write_bytes(content.getvalue())
    return path


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle0", "pickle2", "pickle4"])
def test_a_hostile_file_runs_nothing(tmp_path, how):
    marker = tmp_path / "marker"
    for name in ("states.pt", ".metadata"):
        path = written(tmp_path / name, how, Hostile(marker))
        for read in (check_file, load_tensors, read_metadata):
            with pytest.raises(CheckpointError, match=rf"{name}, got: ") as caught:
                read(path)
            assert "\n" not in str(caught.value)
            if read is load_tensors and how in ("zip", "legacy", "pickle2"):
                assert "asks for posix.system; nothing of it was run" in str(caught.value)
    assert not marker.exists()
    if how.startswith("pickle"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()  # the file was one that runs


def test_other_code_that_loads_inside_the_block_is_held_to_it(tmp_path):
    marker = tmp_path / "marker"
    path = written(tmp_path / "states.pt", "zip", Hostile(marker))
    with only_tensors(), pytest.raises(CheckpointError, match=r"posix\.system"):
        torch.load(path, weights_only=False)
    assert not marker.exists()


def test_tensors_and_plain_values_are_read(tmp_path):
    state = {"w": torch.arange(6.0).reshape(2, 3), "step": 3, "betas": (0.9, 0.99), "none": None}
    torch.save(state, tmp_path / "states.pt")
    check_file(tmp_path / "states.pt")
    found = load_tensors(tmp_path / "states.pt")
    assert torch.equal(found.pop("w"), state.pop("w"))
    assert found == state


@pytest.mark.parametrize("cut", [0, 3, 200])
def test_a_torn_file_is_refused_in_one_line(tmp_path, cut):
    torch.save({"w": torch.zeros(99)}, tmp_path / "states.pt")
    (tmp_path / "states.pt").write_bytes((tmp_path / "states.pt").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"states\.pt, got: \S"):
        check_file(tmp_path / "states.pt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_of_every_type_of_tensor_is_read(tmp_path):
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
    state = {name: torch.zeros(3, dtype=getattr(torch, name)) for name in names}
    shared.save({"tensors": state, "step": 4}, checkpoint_id=tmp_path / "saved")
    found = read_metadata(tmp_path / "saved" / ".metadata").state_dict_metadata
    assert found.keys() == {*(f"tensors.{name}" for name in names), "step"}
