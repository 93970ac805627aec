"""One rank of the tests of a stored reference. Arguments: folder; `build`, `slow` or `train`."""

import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from step_worker import COLLECTIVES, NoUpdate  # before deepspeed is imported
from transformers import PreTrainedModel

from safereg_dist.cli import main as safereg
from safereg_dist.commands.reference import build_store
from safereg_dist.config import load_config
from safereg_dist.errors import SafeRegError
from safereg_dist.factory import build_risk_context, build_run, start_backend
from safereg_dist.parallel.shards import weights_fingerprint
from safereg_dist.trainer import optimizer_step

STORES = {
    "llama": ["model=llama", "reference.model=llama-reference"],
    # Whether a reference is built must not change what the policy drops.
    "dropout": ["model=llama-dropout", "reference.model=llama-reference"],
    "falcon": ["model=falcon", "reference.model=falcon-reference"],
    "qwen": ["model=qwen", "reference.model=qwen-reference"],
    "bf16": ["model=llama", "reference.model=llama-reference", "train.precision=bf16"],
    "high": ["model=llama", "reference.model=llama-reference", "regularizer.threshold=0.8"],
    "batch": [
        *("model=llama", "reference.model=llama-reference"),
        *("regularizer.granularity=batch", "regularizer.schedule=linear"),
    ],
}
"""Overrides of each store; a case that trains from it differs in the threshold only."""

FORWARDS: Counter[str] = Counter()


def count_forwards(module, arguments) -> None:
    """Notes each forward of a trunk, the policy's and the reference's alike."""
    if isinstance(module, PreTrainedModel) and module.base_model is module:
        FORWARDS[type(module).__name__] += 1


torch.nn.modules.module.register_module_forward_pre_hook(count_forwards)


def build(folder: Path) -> None:
    """All stores, each by the verb, in one process group."""
    for name, overrides in STORES.items():
        store = str(folder / "stores" / name)
        status = safereg(
            ["reference", "build", str(folder / "base.yaml"), *overrides, "--out", store]
        )
        assert status == 0, name
    build_that_rank_1_cannot_write(folder)


def build_that_rank_1_cannot_write(folder: Path) -> None:
    """The place of rank 1's second shard is taken; each rank writes what was raised there."""
    config = load_config(folder / "base.yaml", STORES["llama"])
    parts = build_risk_context(config, start_backend(config), with_reference=True)

    def take_place(*_: object) -> None:
        (folder / "broken.partial" / "rank1-00001.safetensors").mkdir(exist_ok=True)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(take_place)
    try:
        build_store(parts, folder / "broken", shard_bytes=2_000)
    except SafeRegError as error:
        text = f"{type(error).__name__}: {error}"
        (folder / f"broken.rank{parts.ranks.rank}").write_text(text)
    hook.remove()


def slow_build(folder: Path) -> None:
    """A build of many small shards that takes its time, to be killed in the middle."""
    config = load_config(folder / "base.yaml", STORES["llama"])
    parts = build_risk_context(config, start_backend(config), with_reference=True)
    torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: time.sleep(0.005))
    build_store(parts, folder / "slow", shard_bytes=2_000)


def one_step(folder: Path, backend, name: str, overrides: list[str]) -> dict:
    """One optimizer step without the update; gradients go to a file of rank 0."""
    run = build_run(load_config(folder / "base.yaml", overrides), backend)
    held = replace(run, engine=NoUpdate(run))
    collectives_before, forwards_before = len(COLLECTIVES), Counter(FORWARDS)
    plan, totals, _ = optimizer_step(held, run.sources.rows_of_step(0), step=0, lr=0.0)
    collectives = COLLECTIVES[collectives_before:]
    forwards = FORWARDS - forwards_before
    if backend.ranks.is_main:
        np.savez(folder / f"{name}.npz", **held.engine.grads)
    run.engine.engine.destroy()
    results = plan.metrics.results
    rows = [
        (row.id, coef)
        for batch, result in results
        for row, coef in zip(batch.rows, result.kl_coef, strict=True)
    ]
    return {
        "loss": totals.sums["loss"],
        "rows": rows,
        "misses": sum(result.reference_misses for _, result in results),
        "rows_run": sum(result.reference_rows for _, result in results),
        "collectives": collectives,
        "forwards": dict(forwards),
        "fingerprint": run.fingerprints.get("reference"),
    }


def cases(world_size: int) -> dict[str, list[str]]:
    """Overrides of each step by name: `X-online` and `X-stored` see the same rows."""
    names = {
        1: ["llama", "bf16", "dropout"],
        2: ["llama", "bf16", "falcon", "qwen", "batch"],
        3: ["llama"],
    }
    found = {}
    for name in names[world_size]:
        found[f"{name}-online"] = STORES[name]
        found[f"{name}-stored"] = [*STORES[name], f"reference.cache=stores/{name}"]
    found["high-stored"] = [*STORES["llama"], "reference.cache=stores/high"]
    if world_size == 2:
        plain = ["regularizer.objective=none", "data.anchor=null"]
        found["plain"] = ["model=llama", *plain]
        stale = ["train.precision=bf16", "reference.cache=stores/llama"]
        found["stale"] = [*STORES["llama"], *stale]
        found["spoilt"] = [*STORES["llama"], "reference.cache=stores/spoilt"]
    return found


def train(folder: Path) -> None:
    """All cases; what a rank found goes to a file of its own."""
    backend = start_backend(load_config(folder / "base.yaml", STORES["llama"]))
    found: dict[str, dict] = {}
    for name, overrides in cases(backend.ranks.world_size).items():
        try:
            found[name] = one_step(folder, backend, name, overrides)
        except SafeRegError as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    files = {
        name: weights_fingerprint(folder / f"{name}-reference", backend.ranks)
        for name in ("llama", "falcon", "qwen")
    }
    (folder / f"found.rank{backend.ranks.rank}.json").write_text(
        json.dumps({"cases": found, "fingerprints": files})
    )


def main() -> None:
    """What the last argument says."""
    folder = Path(sys.argv[-2])
    os.chdir(folder)
    {"build": build, "slow": slow_build, "train": train}[sys.argv[-1]](folder)
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
