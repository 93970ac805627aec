"""A rank of `test_lora.py`: the cases of `support.adapted` under an engine.

    lora_worker.py ENGINE FOLDER [CASE ...]

Rank 0 writes losses and gradients of each case.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `support`

from safetensors.torch import save_file
from support.adapted import CASES, IDS, MICRO_BATCHES, Alone, adapted, settings_of, train
from torch import nn

from safereg_dist import prepare
from safereg_dist.errors import ConfigError
from safereg_dist.factory.prepare import reference_backend
from safereg_dist.parallel.comm import Ranks


class Zero3(Alone):
    """deepspeed.initialize at stage 3."""

    def __init__(self, model: nn.Module) -> None:
        import deepspeed

        super().__init__(model)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": MICRO_BATCHES,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            },
        )
        self.forward = self.engine

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """The engine's; it counts micro-batches by its steps."""
        self.engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self.engine.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole, by name (collective)."""
        from deepspeed.utils import safe_get_full_grad

        named = self.model.named_parameters()
        return {name: safe_get_full_grad(p).clone() for name, p in named if p.requires_grad}

    def update(self) -> None:
        """The engine's step."""
        self.engine.step()


class Fsdp2(Alone):
    """torch's `fully_shard`, a unit for each layer and one for the rest."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """SGD over the shards."""
        from torch.distributed.fsdp import fully_shard

        for layer in self.model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(self.model)
        return super().make_optimizer()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole, by name (collective)."""
        return {name: grad.full_tensor() for name, grad in super().gradients().items()}


ENGINES = {"zero3": Zero3, "fsdp2": Fsdp2}


def facts_of(model: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """Parameters that ZeRO-3 has left whole, and the base model's fingerprint from its shards."""
    named = model.named_parameters()
    left = [name for name, p in named if p.ds_status.name != "NOT_AVAILABLE"]
    backend = reference_backend("zero3", ranks)
    return {"left": left, "fingerprint": backend.fingerprint(model.get_base_model())}


def unbound() -> str:
    """What a raw loop says that has not told the regulariser of its engine."""
    model = adapted(CASES[0])
    regularizer = prepare(model, settings_of(CASES[0]))
    Zero3(model)
    try:
        regularizer.reference.model.hidden_states(torch.tensor([[1, 2, 3]]))
    except ConfigError as err:
        return str(err)
    return ""


def main() -> None:
    """All cases; the first rank writes."""
    engine, folder, *chosen = sys.argv[1:]
    torch.set_num_threads(1)
    if engine == "zero3":
        import deepspeed

        import safereg_dist.parallel.deepspeed  # noqa: F401 - turns DeepSpeed's builds off

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    else:
        torch.distributed.init_process_group("gloo")
    is_first = torch.distributed.get_rank() == 0
    facts = {}
    for case in CASES:
        if chosen and case.name not in chosen:
            continue
        found, regularizer, model = train(case, ENGINES[engine])
        tensors = {name: grad.contiguous() for name, grad in found.gradients.items()}
        tensors["prefix"] = regularizer.reference.model.prefix_states(IDS, 2)
        if engine == "zero3":
            facts[case.name] = facts_of(model, regularizer.ranks)
        if is_first:
            tensors["losses"] = torch.tensor(found.losses, dtype=torch.float64)
            save_file(tensors, Path(folder, f"{case.name}.safetensors"))
    if engine == "zero3":
        facts["unbound"] = unbound()
    if is_first:
        Path(folder, "facts.json").write_text(json.dumps(facts))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads would wait for one another


if __name__ == "__main__":
    main()
