"""One rank of the tests of `patch_model` inside engines. Arguments: folder of the test."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from support.builders import tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import safereg_dist.parallel.deepspeed  # noqa: F401 - turns DeepSpeed's builds off
from safereg_kernels import patch_model

Result = dict[str, list]
STEPS = 2


def batches(rank: int) -> list[dict[str, torch.Tensor]]:
    """A batch a step, another one on each rank; ranks have different numbers of labels."""
    generator = torch.Generator().manual_seed(10 + rank)
    made = []
    for step in range(STEPS):
        ids = torch.randint(3, 60, (2, 9 + rank), generator=generator)
        labels = ids.clone()
        labels[:, : 2 + step] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def trained(
    model: nn.Module,
    backward: Callable[[torch.Tensor], object],
    grad_of: Callable[[nn.Parameter], torch.Tensor | None],
    step: Callable[[], object],
    base: nn.Module,
) -> Result:
    """Losses of some steps, and the largest entry and the sum of every gradient of each."""
    losses, grads = [], []
    for batch in batches(torch.distributed.get_rank()):
        outputs = model(**batch, num_items_in_batch=torch.tensor(11), use_cache=False)
        losses.append(outputs.loss.item())
        backward(outputs.loss)
        for name, parameter in base.named_parameters():
            grad = grad_of(parameter)
            assert grad is not None, name
            grads.append([float(grad.norm()), float(grad.sum())])
        step()
    assert (outputs.logits is None) == ("forward" in vars(base))
    return {"losses": losses, "grads": grads}


def with_torch(base: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> Result:
    """Plain SGD on what `wrap` makes of the model."""
    model = wrap(base)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def grad_of(parameter: nn.Parameter) -> torch.Tensor | None:
        grad = parameter.grad
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return trained(model, torch.Tensor.backward, grad_of, step, base)


def fsdp2(model: nn.Module, *, is_head_alone: bool) -> nn.Module:
    """Layers sharded one by one; the head too, or with what is left (a tied one must be)."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if is_head_alone:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def zero3(base: nn.Module) -> Result:
    """DeepSpeed ZeRO-3 with SGD, everything partitioned."""
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=base, model_parameters=base.parameters(), config=settings
    )
    result = trained(engine, engine.backward, safe_get_full_grad, engine.step, base)
    left = [name for name, p in base.named_parameters() if p.ds_status.name == "AVAILABLE"]
    assert not left, left
    engine.destroy()
    return result


ENGINES: dict[str, Callable[[nn.Module], Result]] = {
    "ddp": lambda model: with_torch(model, DistributedDataParallel),
    "fsdp2": lambda model: with_torch(model, lambda m: fsdp2(m, is_head_alone=False)),
    "fsdp2-head": lambda model: with_torch(model, lambda m: fsdp2(m, is_head_alone=True)),
    "zero3": zero3,
}


def main() -> None:
    """Every engine with the model as it is and patched, tied and not."""
    deepspeed.init_distributed(dist_backend="gloo")
    found = {}
    for engine, run in ENGINES.items():
        for tied in (False, True) if engine != "fsdp2-head" else (False,):
            for name, patch in (("own", lambda model: model), ("patched", patch_model)):
                model = patch(tiny_model(tie_word_embeddings=tied, num_hidden_layers=2))
                found[f"{engine}/{'tied' if tied else 'untied'}/{name}"] = run(model)
    rank = torch.distributed.get_rank()
    (Path(sys.argv[-1]) / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
