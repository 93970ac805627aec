"""One rank of the FSDP2 tests. Arguments: folder of the test, what to do."""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from safereg_dist.config import load_config
from safereg_dist.factory import build_run, start_backend
from safereg_dist.factory.references import packing_of
from safereg_dist.parallel.fsdp2 import Fsdp2Backend
from safereg_dist.reference import EngineModel, Reference
from safereg_dist.run.export import export_model
from safereg_dist.trainer import optimizer_step


def losses_of(run, steps: int) -> list[float]:
    """The losses of some steps."""
    losses = []
    for step in range(steps):
        done = optimizer_step(run, run.sources.rows_of_step(step), step=step, lr=1e-3)
        losses.append(done.totals.sums["loss"])
    return losses


def moved(folder: Path) -> dict:
    """A checkpoint of other ranks, loaded and exported here; then the bytes between two steps, and
    a gradient that is not finite on one rank."""
    config = load_config(folder / "run.yaml")
    run = build_run(config, start_backend(config))
    run.engine.load(folder / "whole" / "checkpoint" / "step-00000003" / "engine")
    export_model(run.model, run.tokenizer, folder / "moved", backend=run.backend, shard_bytes=10**9)
    losses = losses_of(run, 2)
    state = run.engine._optimizer.state.values()
    aside = {_storage(t) for each in state for t in each.values()}
    models = (run.model, reference_of(run))
    whole = [sum(p.numel() * p.element_size() for p in model.parameters()) for model in models]
    found = {"losses": losses, "live": live_bytes(aside), "whole": sum(whole)}
    return found | {"skipped": skips(run)}


def skips(run) -> bool:
    """Whether a gradient that is not finite on one rank moves no weight."""
    before = run.backend.fingerprint(run.model)
    scale = float("inf") if run.ranks.rank == 1 else 1.0
    run.engine.backward(run.engine(torch.arange(6, 16)[None]).sum() * scale, is_last=True)
    applied = run.engine.update(1.0).applied
    return not applied and run.backend.fingerprint(run.model) == before


def stages(folder: Path) -> dict:
    """ZeRO-1 and 2 in both precisions: a step, one that is skipped, and a step; the weights."""
    config = load_config(folder / "run.yaml", ["engine.name=deepspeed"])
    backend, found = None, {}
    for stage in (1, 2):
        for precision in ("fp32", "bf16"):
            own = [f"engine.zero_stage={stage}", f"train.precision={precision}"]
            config = load_config(folder / "run.yaml", ["engine.name=deepspeed", *own])
            backend = backend or start_backend(config)
            run = build_run(config, backend)
            first = losses_of(run, 1)
            skipped = skips(run)
            after = losses_of(run, 2)
            found[f"{stage} {precision}"] = {
                "skipped": skipped,
                "losses": [*first, *after],
                "fingerprint": backend.fingerprint(run.model),
                "sharded": sum(isinstance(p, DTensor) for p in reference_of(run).parameters()),
            }
            run.engine.engine.destroy()
    return found


def reference_of(run) -> torch.nn.Module:
    """The reference's own model."""
    return run.regularizer.reference.model.engine.module.model


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    own = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return own.untyped_storage().data_ptr(), own.untyped_storage().nbytes()


def live_bytes(aside: set[tuple[int, int]]) -> int:
    """Bytes of all tensors of this process but those set aside."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta]
    return sum(size for _, size in {_storage(tensor) for tensor in tensors} - aside)


def beside(folder: Path) -> dict:
    """A policy under ZeRO-3 with a reference under ZeRO-3, and with one under FSDP2."""
    config = load_config(folder / "run.yaml", ["engine.name=deepspeed", "train.precision=fp32"])
    backend = start_backend(config)
    experts = backend.load_model(folder / "experts", precision="fp32", offload="none")
    found: dict = {"experts": backend.fingerprint(experts)}
    for name in ("zero3", "fsdp2"):
        run = build_run(config, backend)
        if name == "fsdp2":
            settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
            alive = HfDeepSpeedConfig(settings)  # as a trainer keeps it beside its policy
            own = Fsdp2Backend(backend.ranks)
            model = own.load_model(folder / "reference", precision="fp32", offload="none")
            del alive
            reference = EngineModel.of_model(model, backend=own, offload="none", rows=2)
            run.regularizer.reference = Reference(
                reference, ranks=backend.ranks, packing=packing_of(config)
            )
            found["fingerprints"] = [own.fingerprint(model), run.fingerprints["reference"]]
            found["passes"] = passes(reference)
            alone = own.load_head(folder / "reference", precision="fp32")
            with own.gathered(alone.parameters) as [whole], reference.gathered_head() as head:
                found["same_head"] = torch.equal(whole, head.weight)
        found[name] = losses_of(run, 3)
        run.engine.engine.destroy()
    return found


def passes(reference: EngineModel) -> list[list[float]]:
    """What full passes and prefixes give, in turns, and how many parameters each leaves whole."""
    ids = torch.arange(6, 26).reshape(2, 10)
    model = reference.engine.module.model
    seen = []
    for layers in (2, None, 1, None, 2):
        states = (
            reference.hidden_states(ids) if layers is None else reference.prefix_states(ids, layers)
        )
        left = sum(not isinstance(p, DTensor) for p in model.parameters())
        seen.append([float(left), *states.flatten()[::37].tolist()])
    return seen


def main() -> None:
    """Writes what this rank found."""
    folder, work = Path(sys.argv[-2]), sys.argv[-1]
    found = {"moved": moved, "beside": beside, "stages": stages}[work](folder)
    (folder / f"{work}.rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
