"""What benchmarks on the embedded world share: its files, `safereg` as a function, provenance."""

import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import provenance

from safereg_dist.cli import main as safereg
from safereg_dist.demo.world import WorldPaths, build_world

RESULTS = Path(__file__).resolve().parent / "results" / "probe"
PROVENANCE = ("date", "hardware", "commit", "torch", "transformers")
"""Columns that are the same in every row of a run."""


def run_verb(*words: object) -> None:
    """One verb of the `safereg` command, in this process; what is printed can be typed.

    Raises:
        SystemExit: it failed, and has said why.
    """
    texts = [str(word) for word in words]
    print(f"$ safereg {shlex.join(texts)}", flush=True)
    if safereg(texts) != 0:
        raise SystemExit(f"`safereg {texts[0]}` failed, see above")


def world_of(out: Path, seed: int) -> WorldPaths:
    """The world of a seed below `out`, built where it is not there yet (a minute)."""
    return build_world(out / f"seed{seed}" / "world", seed=seed)


def same_for_all() -> dict[str, Any]:
    """The values of `PROVENANCE`."""
    facts = {**provenance(torch.device("cpu")), "transformers": version("transformers")}
    return {name: facts[name] for name in PROVENANCE}
