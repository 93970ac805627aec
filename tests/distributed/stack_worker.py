"""Trains the run of `stack_cases` in one stack and keeps its losses and first gradients.

    stack_worker.py STACK FOLDER OUT [--accumulation A] [--precision bf16] [--steps N]
                    [--cost] [--plain]

Started on any number of ranks; rank 0 writes OUT, and beside it what else was seen. `--cost` counts
the second step, of rows of one length, so that padding is no part of it; `--plain` runs a stack's
Trainer without safety.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `support`

from stack_cases import (
    LORA,
    LR,
    ROWS_PER_STEP,
    STEPS,
    THRESHOLD,
    examples,
    plain_name,
    with_adapters,
)
from support.step_cost import StepCost
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where every stack trains: this rank's GPU, or the CPU."""
BACKEND = "nccl" if DEVICE.type == "cuda" else "gloo"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stack")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--reference", default="auto")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    args.examples = examples(14 if args.cost else None)
    args.counter = StepCost(step=1 if args.cost else None)
    torch.set_num_threads(1)
    args.world = int(os.environ.get("WORLD_SIZE", "1"))
    args.rank = int(os.environ.get("RANK", "0"))
    args.rows = ROWS_PER_STEP // (args.world * args.accumulation)
    kind = args.stack.split("-")[0]
    run = {"trainer": trainer, "sfttrainer": trainer, "lora": trainer}.get(kind, loop)
    if args.stack in OWN_ENGINES:
        run = own_engine
    losses, gradients, facts = run(args)
    if args.rank == 0:
        from safetensors.torch import save_file

        tensors = {name: value.float().cpu().contiguous() for name, value in gradients.items()}
        save_file({"losses": torch.tensor(losses, dtype=torch.float64), **tensors}, args.out)
        args.out.with_suffix(".json").write_text(json.dumps(facts))
    if args.cost:
        args.counter.write(args.out, args.rank)


def settings(args: argparse.Namespace) -> dict:
    """The safety settings, the same in every stack."""
    reference = {} if "lora" in args.stack else {"model": str(args.folder / "reference")}
    if "frozen" in args.stack:
        reference = {"adapter": "aligned"}
    return {
        "reference": reference | {"engine": args.reference},
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "regularizer": {"threshold": THRESHOLD},
        # What is counted is our head, in every micro-batch.
        "train": {"micro_batch_size": args.rows, "stack_loss": not args.cost},
    }


# ---- transformers.Trainer and trl.SFTTrainer


def engine_of(stack: str) -> str:
    """`single`, `ddp`, `zero-N` or `fsdp2`."""
    return stack.split("-", 1)[1] if "-" in stack else "single"


def trainer_arguments(args: argparse.Namespace) -> dict:
    engine = engine_of(args.stack)
    is_patched = engine.startswith(("zero", "fsdp2"))
    if is_patched:
        from support import accelerate_on_cpu  # noqa: F401
    chosen = {
        "output_dir": str(args.out.with_suffix("")),
        "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": args.accumulation,
        "max_steps": args.steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": DEVICE.type == "cpu" and not is_patched,
        "bf16": args.precision == "bf16",
        "train_sampling_strategy": "sequential",
    }
    if engine.startswith("zero"):
        chosen["deepspeed"] = {
            "zero_optimization": {
                "stage": int(engine[-1]),
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": 0.0,  # deepspeed 0.19 clips by default
            "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": "auto"},
        }
    if engine == "fsdp2":
        chosen["fsdp"] = True
        chosen["fsdp_config"] = {
            "version": 2,
            "fsdp_version": 2,
        }
    return chosen


def trainer(args: argparse.Namespace):
    """(losses, first gradients, facts) of a Trainer's run."""
    if "zero" in args.stack:
        os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)
        import safereg_dist.parallel.deepspeed  # noqa: F401 - turns DeepSpeed's builds off
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainingArguments

    rows = [e.feature(i) for i, e in enumerate(args.examples[: args.steps * ROWS_PER_STEP])]
    chosen = trainer_arguments(args)
    if args.stack == "sfttrainer-packed":  # packing changes the order: each epoch is a step
        rows = rows[:ROWS_PER_STEP]
        lines = 64 if args.accumulation == 1 else 2
        chosen |= {"per_device_train_batch_size": lines, "gradient_accumulation_steps": 32}
    data = Dataset.from_list(rows)
    extra = {}
    if args.stack.startswith("sfttrainer"):
        from transformers import AutoTokenizer
        from trl import SFTConfig

        from safereg_dist.integrations.trl import SafeRegSFTTrainer as Base

        packed = {"packing": True} if args.stack == "sfttrainer-packed" else {}
        arguments = SFTConfig(**chosen, max_length=64, **packed)
        extra["processing_class"] = AutoTokenizer.from_pretrained(args.folder / "policy")
    else:
        from support.builders import word_tokenizer
        from transformers import DataCollatorForSeq2Seq

        from safereg_dist.integrations.trainer import SafeRegTrainer as Base

        if args.plain:
            from transformers import Trainer as Base
        arguments = TrainingArguments(**chosen)
        extra["data_collator"] = DataCollatorForSeq2Seq(word_tokenizer())

    losses = []

    class Watched(Base):
        def get_batch_samples(self, *rest, **how):
            args.counter.begin(self.state.global_step)
            return super().get_batch_samples(*rest, **how)

        def log(self, logs, *rest, **how):
            if "loss" in logs:
                losses.append(logs["loss"])
            super().log(logs, *rest, **how)

    dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.folder / "policy", dtype=dtype)
    if args.stack.startswith("lora"):
        model = with_adapters(model)
    if not args.plain:
        extra["safereg"] = settings(args)
    made = Watched(model=model, args=arguments, train_dataset=data, **extra)
    gradients: dict[str, torch.Tensor] = {}
    watch(made, gradients, args.counter)
    made.train()
    if args.plain:
        return losses, gradients, {}
    facts = {"parameter_bytes": parameter_bytes(made.model, made.safereg)}
    return losses, gradients, facts


def watch(made, gradients: dict[str, torch.Tensor], counter: StepCost) -> None:
    """Keeps the gradients of the first update, before it, and ends the counting of a step."""
    from transformers import TrainerCallback

    class First(TrainerCallback):
        def on_step_end(self, args, state, control, **how):
            counter.end(state.global_step - 1)

        def on_train_begin(self, args, state, control, **how):
            engine = made.model_wrapped
            if not hasattr(engine, "optimizer"):
                return
            plain = engine.step

            def step(*rest, **how):
                if not gradients and engine.is_gradient_accumulation_boundary():
                    gradients.update(zero_gradients(made.model))
                return plain(*rest, **how)

            engine.step = step

        def on_pre_optimizer_step(self, args, state, control, **how):
            if not gradients:
                gradients.update(whole_gradients(made.model))

    made.add_callback(First())


def zero_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a DeepSpeed engine's parameters, whole. Collectives: DeepSpeed's."""
    from deepspeed.utils import safe_get_full_grad

    return {
        plain_name(name): safe_get_full_grad(parameter).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of parameters that are whole or DTensors."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[plain_name(name)] = whole.detach().clone()
    return found


def parameter_bytes(model: nn.Module, regularizer) -> list[int]:
    """Bytes of parameters of policy and reference that this rank holds, and those of both whole."""
    own = whole = 0
    for parameter in {id(p): p for p in all_parameters(model, regularizer)}.values():
        own += local_bytes(parameter)
        whole += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
    return [own, whole]


def all_parameters(model: nn.Module, regularizer):
    yield from model.parameters()
    engine = getattr(regularizer.reference.model, "_engine", None)
    if engine is not None:
        yield from engine.module.parameters()
        yield from regularizer.reference.model.head.parameters


def local_bytes(parameter) -> int:
    if hasattr(parameter, "ds_tensor"):
        gathered = parameter.numel() if parameter.ds_status.name == "AVAILABLE" else 0
        return (parameter.ds_tensor.numel() + gathered) * parameter.element_size()
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() * local.element_size()


# ---- the engines of `safereg train`

OWN_ENGINES = {
    "single": "single",
    "deepspeed-zero-3": "deepspeed",
    "fsdp2": "fsdp2",
    "train-zero-1": "deepspeed",
    "train-zero-2": "deepspeed",
    "train-lora-single": "single",
    "train-lora-zero-2": "deepspeed",
    "train-lora-zero-3": "deepspeed",
    "train-lora-fsdp2": "fsdp2",
    "train-lora-frozen-single": "single",
    "train-lora-frozen-zero-2": "deepspeed",
    "train-lora-frozen-zero-3": "deepspeed",
    "train-lora-frozen-fsdp2": "fsdp2",
}


def own_engine(args: argparse.Namespace):
    """(losses, first gradients, facts) of `optimizer_step` on an engine of our own."""
    from safereg_dist import build_run, optimizer_step, row_of, start_backend
    from safereg_dist.config import config_from_dict

    engine = OWN_ENGINES[args.stack]
    data, lora = args.folder / "any.jsonl", None
    if "lora" in args.stack:
        lora = {"rank": LORA["r"], "alpha": LORA["lora_alpha"], "targets": LORA["target_modules"]}
        lora["path"] = str(args.folder / "adapter")
    if lora is not None and "frozen" in args.stack:
        lora["frozen"] = {"aligned": str(args.folder / "aligned")}
    config = config_from_dict(
        {
            **settings(args),
            "model": str(args.folder / "policy"),
            "data": {"train": str(data)},
            "optimizer": {"lr": LR, "schedule": "constant", "warmup_ratio": 0, "max_grad_norm": 0},
            "train": {
                "micro_batch_size": args.rows,
                "grad_accum_steps": args.accumulation,
                "precision": args.precision,
            },
            "engine": {"name": engine, "zero_stage": stage_of(args.stack)},
            "lora": lora,
        }
    )
    run = build_run(config, start_backend(config))
    losses, gradients = [], {}
    plain = run.engine.update

    def update(lr):
        if not gradients:
            read = zero_gradients if engine == "deepspeed" else whole_gradients
            model = run.model if engine != "single" else masters(run)
            gradients.update(read(model))
        return plain(lr)

    object.__setattr__(run.engine, "update", update)
    for step in range(args.steps):
        rows = [
            row_of(f"row-{i}", e.input_ids, [int(label != -100) for label in e.labels], risk=e.risk)
            for batch in batches_of(args, step)
            for i, e in batch
        ]
        args.counter.begin(step)
        result = optimizer_step(run, rows, step=step, lr=LR)
        args.counter.end(step)
        losses.append(result.totals.sums["loss"])
    return losses, gradients, {"parameter_bytes": parameter_bytes(run.model, run.regularizer)}


def stage_of(stack: str) -> int:
    """The number that ends a stack's name; 3 without one."""
    return int(stack[-1]) if stack[-1].isdigit() and "fsdp" not in stack else 3


def masters(run) -> nn.Module:
    """The single engine's float32 weights, which hold its gradients, under the model's names."""
    engine = run.engine
    by_id = {id(p): master for p, master in zip(engine._trained, engine._masters, strict=True)}
    holder = nn.Module()
    holder.named_parameters = lambda: [  # type: ignore[method-assign]
        (name, by_id[id(p)]) for name, p in run.model.named_parameters() if id(p) in by_id
    ]
    return holder


# ---- loops of one's own


def loop(args: argparse.Namespace):
    """(losses, first gradients, facts) of a loop around the regulariser's own verbs."""
    from safereg_dist import prepare
    from safereg_dist.integrations.collator import KEY, RowCollator

    engine = ENGINES[args.stack](args)
    model = engine.model
    chosen = settings(args)
    chosen["train"] |= {"precision": args.precision}
    regularizer = prepare(model, chosen)
    engine.wrap()
    regularizer.bind(engine.forward)
    collate = RowCollator(padded, needs_positions=False)
    losses, gradients = [], {}
    for step in range(args.steps):
        windows = [
            collate([e.feature(i) for i, e in numbered]) for numbered in batches_of(args, step)
        ]
        args.counter.begin(step)
        plan = regularizer.open([inputs[KEY] for inputs in windows], step=step)
        for planned, inputs in zip(plan.micro_batches, windows, strict=True):
            batch = inputs.pop(KEY)
            given = inputs | {"use_cache": False}
            loss = regularizer.loss(engine.forward, given, planned, batch, plan)
            engine.backward(loss * args.world, is_last=planned.is_last)
        if not gradients:
            gradients = engine.gradients()
        engine.update()
        losses.append(regularizer.close(plan).sums["loss"])
        args.counter.end(step)
    return losses, gradients, {"parameter_bytes": parameter_bytes(model, regularizer)}


def batches_of(args: argparse.Namespace, step: int):
    """This rank's micro-batches of a step, each a list of (index, example): as accelerate deals."""
    first = step * ROWS_PER_STEP
    rows = list(enumerate(args.examples))[first : first + ROWS_PER_STEP]
    batches = [rows[i : i + args.rows] for i in range(0, len(rows), args.rows)]
    return batches[args.rank :: args.world]


def padded(features: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(feature["input_ids"]) for feature in features)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        key: torch.tensor([f[key] + [fill] * (width - len(f[key])) for f in features]).to(DEVICE)
        for key, fill in fills.items()
    }


class Plain:
    """One process, plain torch."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        self.args = args
        self.model = AutoModelForCausalLM.from_pretrained(
            args.folder / "policy", dtype=torch.float32
        ).train()
        self.model.to(DEVICE)

    def wrap(self) -> None:
        self.forward = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)

    def backward(self, loss, *, is_last: bool) -> None:
        loss.backward()

    def gradients(self) -> dict[str, torch.Tensor]:
        return whole_gradients(self.model)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class DistributedDataParallel(Plain):
    """torch's DDP."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.distributed.init_process_group(BACKEND)
        super().__init__(args)

    def wrap(self) -> None:
        super().wrap()
        self.forward = torch.nn.parallel.DistributedDataParallel(self.model)


class FullyShard(DistributedDataParallel):
    """torch's FSDP2."""

    def wrap(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in self.model.model.layers:
            fully_shard(layer)
        fully_shard(self.model)
        Plain.wrap(self)


class Zero(Plain):
    """deepspeed.initialize at the stage that ends the stack's name; 3 without one."""

    def __init__(self, args: argparse.Namespace) -> None:
        os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)
        import deepspeed

        import safereg_dist.parallel.deepspeed  # noqa: F401 - turns DeepSpeed's builds off

        deepspeed.init_distributed(BACKEND, auto_mpi_discovery=False, verbose=False)
        super().__init__(args)
        self.stage = stage_of(args.stack)

    def wrap(self) -> None:
        import deepspeed

        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        config = {
            "train_micro_batch_size_per_gpu": self.args.rows,
            "gradient_accumulation_steps": self.args.accumulation,
            "gradient_clipping": 0.0,  # deepspeed 0.19 clips by default
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.stage,
                "stage3_param_persistence_threshold": 0,
            },
        }
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        self.forward = self.engine

    def backward(self, loss, *, is_last: bool) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self.engine.step()  # counts micro-batches

    def gradients(self) -> dict[str, torch.Tensor]:
        return zero_gradients(self.model)

    def update(self) -> None:
        self.engine.step()


class Accelerate(Plain):
    """An accelerate loop, DDP under it."""

    def wrap(self) -> None:
        super().wrap()
        self.forward, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def __init__(self, args: argparse.Namespace) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=DEVICE.type == "cpu")
        super().__init__(args)

    def backward(self, loss, *, is_last: bool) -> None:
        self.accelerator.backward(loss)


ENGINES = {
    "raw": Plain,
    "raw-ddp": DistributedDataParallel,
    "raw-fsdp2": FullyShard,
    "raw-deepspeed": Zero,
    "deepspeed-zero-1": Zero,
    "deepspeed-zero-2": Zero,
    "accelerate-loop": Accelerate,
}


if __name__ == "__main__":
    main()
