"""Shared fixtures: quiet libraries, small models on disk, and the deepspeed launcher."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see launch/setup_env.sh
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from support.launching import Launcher

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated


OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def row_cache(tmp_path_factory, monkeypatch):
    """Tokenised rows are cached below pytest's own folder, never in the user's home."""
    monkeypatch.setenv("SAFEREG_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def no_rank():
    """What a run in this process says of itself as a rank is not passed on to later tests."""
    before = {name: os.environ.get(name) for name in OF_A_RANK}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def launch(tmp_path) -> Launcher:
    """Runs scripts under the deepspeed launcher or torchrun; logs go below `tmp_path`."""
    return Launcher(tmp_path)
