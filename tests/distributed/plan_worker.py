"""One rank of the plan's test: real training steps, their bytes and what is held. Argument: folder.

Bytes are counted at torch's own functions, before deepspeed takes hold of them: what this rank
receives from others, by the definition in `safereg_dist.plan.traffic`.
"""

import json
import os
import sys
from pathlib import Path

import torch

RECEIVED = [0.0]
_DEPTH = [0]
OTHERS = {
    "all_reduce": lambda tensor, ranks: 2 * nbytes(tensor) * (ranks - 1) / ranks,
    "broadcast": lambda tensor, ranks: nbytes(tensor) * (ranks - 1) / ranks,
    "all_gather": lambda tensors, ranks: sum(map(nbytes, tensors)) * (ranks - 1) / ranks,
    "all_gather_into_tensor": lambda tensor, ranks: nbytes(tensor) * (ranks - 1) / ranks,
    "all_gather_single": lambda tensor, ranks: nbytes(tensor) * (ranks - 1) / ranks,
    "reduce_scatter_tensor": lambda tensor, ranks: nbytes(tensor) * (ranks - 1),
    "reduce_scatter_single": lambda tensor, ranks: nbytes(tensor) * (ranks - 1),
}
"""Bytes received, from the first argument (the output) and the size of the group."""


def nbytes(tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def count_bytes() -> None:
    """Counts every collective that torch is asked for from now on, and those inside them not."""
    for name, received in OTHERS.items():
        original = getattr(torch.distributed, name, None)
        if original is None:
            continue

        def counted(*args, _original=original, _received=received, **kwargs):
            if _DEPTH[0] == 0:
                output = args[0] if args else next(iter(kwargs.values()))
                ranks = torch.distributed.get_world_size(kwargs.get("group"))
                RECEIVED[0] += _received(output, ranks)
            _DEPTH[0] += 1
            try:
                return _original(*args, **kwargs)
            finally:
                _DEPTH[0] -= 1

        setattr(torch.distributed, name, counted)


count_bytes()

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `support`

import plan_cases  # noqa: E402

import safereg_dist.parallel.deepspeed as adapter  # noqa: E402
import safereg_dist.trainer as training  # noqa: E402
from safereg_dist.config import load_config  # noqa: E402
from safereg_dist.factory import build_run, start_backend  # noqa: E402
from safereg_dist.reference import NoReference  # noqa: E402


def use_reuse_distance(distance: int) -> None:
    """Lets small models behave as large ones: parameters are let go between their uses."""
    build = adapter.policy_config

    def changed(step, config):
        ds = build(step, config)
        ds["zero_optimization"]["stage3_max_reuse_distance"] = distance
        return ds

    adapter.policy_config = changed


def held(run) -> dict[str, int]:
    """Bytes that this rank holds, by the plan's names."""
    optimizer = run.engine.engine.optimizer
    shards = {p.ds_tensor.untyped_storage().data_ptr() for p in run.model.parameters()}
    master = [t for t in optimizer.fp32_partitioned_groups_flat if not shares(t, shards)]
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    found = {
        "policy shards": sum(nbytes(p.ds_tensor) for p in run.model.parameters()),
        "master weights": sum(map(nbytes, master)),
        "Adam moments": sum(map(nbytes, moments)),
        "gradients": nbytes(optimizer.grad_partitions_flat_buffer),
        "small parameters, whole": whole_bytes(run.model.parameters()),
    }
    reference = reference_parameters(run)
    if reference:
        found["reference shards"] = sum(nbytes(p.ds_tensor) for p in reference)
        found["small parameters, whole"] += whole_bytes(reference)
    return found


def second_shards(run) -> int:
    """Bytes of hpZ's shards, which live from a parameter's first use to the update."""
    seconds = [p.ds_secondary_tensor for p in run.model.parameters()]
    return sum(nbytes(tensor) for tensor in seconds if tensor is not None)


def reference_parameters(run) -> list:
    """The frozen model's parameters; none where there is no reference."""
    reference = run.regularizer.reference
    if isinstance(reference, NoReference) or run.config.has_adapters_off:
        return []
    return list(reference.model.engine.module.parameters())


def whole_bytes(parameters) -> int:
    """Bytes of parameters that stay whole."""
    return sum(p.ds_numel * p.element_size() for p in parameters if p.ds_persist)


def shares(tensor, storages) -> bool:
    """True where the tensor is a part of one of these storages."""
    return tensor.untyped_storage().data_ptr() in storages


def run_case(folder, case, backend) -> None:
    """Trains some steps; writes the last one's bytes and what is held during it."""
    out = folder / f"{case.name}-{backend.ranks.world_size}"
    config = load_config(folder / "base.yaml", [*case.overrides(), f"output_dir={out}"])
    build = adapter.policy_config
    use_reuse_distance(case.reuse_distance)
    run = build_run(config, backend)
    adapter.policy_config = build
    result = {}
    step, backward = training.optimizer_step, run.engine.backward

    def measured_backward(*args, **kwargs):
        backward(*args, **kwargs)
        result["second"] = second_shards(run)

    def measured(*args, **kwargs):
        before = RECEIVED[0]
        outcome = step(*args, **kwargs)
        result["bytes"] = RECEIVED[0] - before
        result["held"] = {**held(run), "policy's second shards (hpZ)": result["second"]}
        return outcome

    run.engine.backward = measured_backward

    training.optimizer_step = measured
    training.train(run, None)
    training.optimizer_step = step
    name = f"{case.name}.{backend.ranks.world_size}.rank{backend.ranks.rank}.json"
    (folder / name).write_text(json.dumps(result))
    run.engine.engine.destroy()


def main() -> None:
    """All cases, in an order that is the same on every rank."""
    folder = Path(sys.argv[-1])
    backend = start_backend(load_config(folder / "base.yaml"))
    for case in plan_cases.cases_on(backend.ranks.world_size):
        if backend.ranks.world_size % case.hpz == 0:
            run_case(folder, case, backend)
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
