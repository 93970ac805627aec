"""The layouts of Megatron that are tested, and how far a run is from what it must give."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from stack_cases import Errors

# layout -> its ranks, its options
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2": (2, ()),
    "tp2-sp": (2, ()),
    "pp2": (2, ()),
    "pp2-vpp2": (2, ()),
    "cp2": (2, ("--per-token",)),
    "tp2-pp2-sp": (4, ()),
    "dp2-tp2": (4, ("--overlap",)),
    "dp2-pp2": (4, ("--per-token",)),
}
VOCAB, LENGTH, ROWS, LAYERS, HIDDEN = 64, 16, 2, 4, 32
PROBES = {
    "first": (1, "last_prompt_token"),
    "middle": (3, "mean_prompt"),
    "last": (LAYERS, "mean_response"),
}
"""Name -> its layer and its pooling."""
LAGGED, LAGGED_STEPS = "middle", 3
"""The probe that reads the policy, and the steps that are judged."""
EXPERTS = ("--experts", "4")
"""The options of a model that has experts."""


def normaliser(options: tuple) -> str:
    """What divides a run's loss."""
    return "per-token" if "--per-token" in options else "means"


def tensors(out: Path, ranks: int) -> list[dict[str, torch.Tensor]]:
    """What each rank of a run has kept."""
    return [load_file(out.with_suffix(f".{rank}")) for rank in range(ranks)]


def facts(out: Path, rank: int = 0) -> dict:
    """What a rank has seen besides."""
    return json.loads(out.with_suffix(f".{rank}.json").read_text())


def errors_of(out: Path, ranks: int, folder: Path, kind: str, normaliser: str) -> Errors:
    """Relative errors of losses and of every rank's part of every gradient, in its own norm."""
    wanted = load_file(folder / f"{kind}-{normaliser}.safetensors")
    losses = wanted.pop("losses")
    seen, worst = set(), 0.0
    for own in tensors(out, ranks):
        for name, gradient in own.items():
            if name.startswith("weight "):
                continue
            if name not in wanted:  # tied: the last stage's copy of the embedding
                name = "embedding.word_embeddings.weight"
            parts = [wanted[name]]
            for dim, (size, length) in enumerate(zip(gradient.shape, parts[0].shape, strict=True)):
                if size != length:
                    parts = wanted[name].chunk(length // size, dim)
            errors = [float((gradient.double() - part).norm() / part.norm()) for part in parts]
            worst = max(worst, min(errors))
            seen.add(name)
    found = torch.tensor(facts(out, ranks - 1)["losses"], dtype=torch.float64)
    gaps = (found / losses[: len(found)] - 1).abs()
    return Errors(float(gaps[0]), worst, float(gaps[-1]), seen ^ wanted.keys())
