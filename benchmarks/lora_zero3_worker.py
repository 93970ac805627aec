"""A rank of `bench_lora_zero3.py`: lora_zero3_worker.py STEPS OUT.json [OPTION ...]

A raw loop around `prepare`: a small random Llama with LoRA under ZeRO-3, its reference the policy
with adapters off. Every third step has no risky row, so no pass with adapters off. Each rank first
takes the same steps alone, without an engine, and says how far the losses are apart.
`--checkpointing`: of activations. `--frozen`: a second adapter is on in policy and reference, and
not trained. `--shared`: both passes along one trace, as without `SeparateTrace`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import safereg_dist.parallel.deepspeed  # noqa: F401 - turns DeepSpeed's builds off
from safereg_dist import collate, prepare, row_of
from safereg_dist.models.architecture import enable_activation_checkpointing
from safereg_dist.types import Row

VOCAB, ROWS, MICRO_BATCHES, LR = 96, 8, 2, 1e-3
_SETTINGS = {
    "reference": {"engine": "adapters_off"},
    "risk": {"estimator": "column"},
    "regularizer": {"schedule": "linear", "ceiling": 0.8, "threshold": 0.5},
    "train": {"precision": "fp32"},
}


def settings_of(frozen: bool) -> dict[str, Any]:
    """The safety settings."""
    adapter = "aligned" if frozen else None
    return {**_SETTINGS, "reference": {"engine": "adapters_off", "adapter": adapter}}


def adapted(checkpointing: bool, frozen: bool) -> Any:
    """A Llama of three layers with adapters, the same on every rank."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,  # else the first gradients are zero, and Adam's steps noise
    )
    model = get_peft_model(LlamaForCausalLM(shape), config)
    if frozen:
        model.add_adapter("aligned", config)
        model.base_model.set_adapter(["aligned", "default"])
        for name, parameter in model.named_parameters():
            if ".aligned." in name:
                parameter.requires_grad_(False)
    if checkpointing:
        model.enable_input_require_grads()
        enable_activation_checkpointing(model)
    return model.train()


def rows_of(step: int) -> list[Row]:
    """The rows of all ranks; without risk in every third step."""
    draw = torch.Generator().manual_seed(step)
    rows = []
    for index in range(ROWS):
        length = int(torch.randint(6, 14, (), generator=draw))
        ids = torch.randint(6, VOCAB, (length,), generator=draw).tolist()
        risk = 0.0 if step % 3 == 2 else float(torch.rand((), generator=draw))
        mask = [0, 0] + [1] * (length - 2)
        rows.append(row_of(f"{step}-{index}", ids, mask, risk=risk))
    return rows


def losses_of(
    regularizer: Any,
    forward: Callable[..., Any],
    backward: Callable[[Any, bool], None],
    update: Callable[[], None],
    steps: int,
) -> Iterator[float]:
    """The loss of each step over all ranks."""
    ranks = regularizer.ranks
    for number in range(steps):
        own = rows_of(number)[ranks.rank :: ranks.world_size]
        plan = regularizer.plan(own, step=number, micro_batches=MICRO_BATCHES)
        for planned in plan.micro_batches:
            batch = collate(planned.rows, pad_id=0)
            with regularizer.loss_of(planned, batch, plan):
                loss = forward(input_ids=batch.input_ids, use_cache=False).logits
            backward(loss * ranks.world_size, planned.is_last)
        update()
        yield regularizer.close(plan).sums["loss"]


def alone(steps: int, checkpointing: bool, frozen: bool) -> list[float]:
    """The losses of one process without an engine."""
    from safereg_dist.parallel.comm import Ranks
    from safereg_dist.parallel.single import SingleBackend

    device = torch.device("cpu")
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=device, dp_group=None)
    model = adapted(checkpointing, frozen)
    regularizer = prepare(model, settings_of(frozen), backend=SingleBackend(ranks))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return list(losses_of(regularizer, model, lambda loss, _: loss.backward(), update, steps))


def under_zero3(steps: int, *, checkpointing: bool, frozen: bool, shared: bool) -> dict[str, Any]:
    """Losses, invalidated traces, parameters left gathered, and the time of a step."""
    model = adapted(checkpointing, frozen)
    regularizer = prepare(model, settings_of(frozen))
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=LR, weight_decay=0.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # deepspeed 0.19 clips by default
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    regularizer.bind(engine)
    if shared:
        regularizer.reference.model._own_trace = nullcontext

    def backward(loss: Any, is_last: bool) -> None:
        engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            engine.step()  # counts micro-batches

    invalidated = count_invalidations()
    losses, ends, left, counts = [], [time.perf_counter()], 0, []
    for loss in losses_of(regularizer, engine, backward, engine.step, steps):
        losses.append(loss)
        ends.append(time.perf_counter())
        counts.append(len(invalidated))
        left += sum(p.ds_status != ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
    return {
        "losses": losses,
        "invalidated": counts[-1],
        "invalidated_after_5": counts[-1] - counts[4],
        "left_gathered": left,
        "step_ms": 1e3 * median(end - begin for begin, end in pairwise(ends)),
    }


def count_invalidations() -> list[int]:
    """A list that grows by one with each trace that DeepSpeed gives up."""
    found: list[int] = []
    plain = PartitionedParameterCoordinator._invalidate_trace

    def counted(self: Any) -> None:
        found.append(1)
        plain(self)

    PartitionedParameterCoordinator._invalidate_trace = counted
    return found


def main() -> None:
    """Both runs; rank 0 writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--shared", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    expected = alone(args.steps, args.checkpointing, args.frozen)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    how = {"checkpointing": args.checkpointing, "frozen": args.frozen}
    found = under_zero3(args.steps, **how, shared=args.shared)
    losses = found.pop("losses")
    gaps = [abs(own / other - 1) for own, other in zip(losses, expected, strict=True)]
    found |= {"worst_gap": max(gaps), "first_loss": losses[0], "last_loss": losses[-1]}
    if torch.distributed.get_rank() == 0:
        args.out.write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # DeepSpeed's threads would wait for one another


if __name__ == "__main__":
    main()
