"""Random states of a rank in a checkpoint: Python's, NumPy's and torch's global generators."""

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from safereg_dist.parallel.comm import Ranks


def save_random(path: Path, device: torch.device) -> None:
    """Writes the states of all generators of this rank."""
    _, words, _ = random.getstate()  # drops the pending gauss() value: it is never used here
    numpy_state = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_pos": torch.tensor([numpy_state["state"]["pos"]]),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    save_file(tensors, path)


def load_random(path: Path, device: torch.device) -> None:
    """Goes on where `save_random` was."""
    tensors = load_file(path)
    torch.set_rng_state(tensors["torch"])
    random.setstate((3, tuple(tensors["python"].tolist()), None))
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, int(tensors["numpy_pos"][0]), 0, 0.0))
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


def new_random(seed: int, step: int, ranks: Ranks) -> None:
    """Generators for a number of ranks that wrote no states: they follow from seed, step, rank."""
    drawn = np.random.SeedSequence([seed, step, ranks.world_size, ranks.rank]).generate_state(3)
    own, python, numpy = (int(number) for number in drawn)
    torch.manual_seed(own)  # of the device too
    random.seed(python)
    np.random.seed(numpy)
