"""Small runs of Trainer classes: their rows, arguments and what is compared of them."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments

from safereg_dist.integrations.trainer import SafeRegTrainer
from support.builders import VOCAB, tiny_model, word_tokenizer
from support.results import TIMES

SETTINGS = {"risk": {"estimator": "column", "max_held_back": 1.0}, "reference": {}}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def features(count: int, *, seed: int = 1, risk: bool = True) -> list[dict[str, Any]]:
    """Rows as a data set has them; half of them risky, and every fifth without a response."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for index in range(count):
        ids = [draw(6, VOCAB) for _ in range(draw(4, 14))]
        prompt = len(ids) if index % 5 == 4 else draw(1, 4)
        row = {
            "input_ids": ids,
            "labels": [-100] * prompt + ids[prompt:],
            "attention_mask": [1] * len(ids),
            "id": f"row-{index}",
        }
        rows.append(row | ({"risk": draw(0, 1001) / 1000} if risk else {}))
    return rows


def dataset(count: int, **how: Any) -> Dataset:
    """The same as a data set."""
    return Dataset.from_list(features(count, **how))


def write_reference(folder: Path) -> Path:
    """A folder with a reference and the word tokenizer."""
    tiny_model(seed=5, **SMALL).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def arguments(folder: Path, cls: type = TrainingArguments, **changes: Any) -> Any:
    """Arguments of six steps of two micro-batches on the CPU, everything logged, nothing sent."""
    chosen = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "bf16": False,  # trl's default is True
        "seed": 3,
    }
    return cls(output_dir=str(folder), **(chosen | changes))


def settings(reference: Path, **changes: Any) -> dict[str, Any]:
    """Settings with the risk column and this reference."""
    return SETTINGS | {"reference": {"model": str(reference)}} | changes


def trainer(folder: Path, *, cls: type = SafeRegTrainer, **how: Any) -> Any:
    """A Trainer of `cls` over a small model; `how` are its arguments, `args` those beside ours.

    A plain Trainer class gets the same without `safereg`.
    """
    model = how.pop("model", None)
    model = tiny_model(attention_dropout=0.1, **SMALL) if model is None else model
    given = {"data_collator": DataCollatorForSeq2Seq(word_tokenizer()), **how}
    given.setdefault("train_dataset", dataset(40))
    args = arguments(folder, **given.pop("args", {}))
    return cls(model=model, args=args, **given)


class Losses(TrainerCallback):
    """Keeps what is logged; `stop` ends the run after a step, `crash` with an error.

    `ask` writes the stop file in a step.
    """

    def __init__(
        self, *, stop: int | None = None, crash: int | None = None, ask: int | None = None
    ) -> None:
        self.logs: list[dict[str, float]] = []
        self._stop, self._crash, self._ask = stop, crash, ask

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self._ask:
            Path(args.output_dir, "stop").touch()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._stop:
            control.should_training_stop = True
        if state.global_step == self._crash:
            raise KeyboardInterrupt

    @property
    def losses(self) -> list[float]:
        """The logged training losses."""
        return [log["loss"] for log in self.logs if "loss" in log]


def run_until_cut(
    folder: Path, reference: Path, *, chosen: dict, save_steps: int, resume: bool, **how: Any
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """(losses, weights, Trainer) of a run with checkpoints; `how` is of `Losses`, but `data`."""
    data = how.pop("data", None)
    seen = Losses(**how)
    made = trainer(
        folder,
        safereg=settings(reference, **chosen),
        callbacks=[seen],
        args={"save_strategy": "steps", "save_steps": save_steps},
        **({} if data is None else {"train_dataset": data}),
    )
    try:
        made.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        pass
    return seen.losses, weights(made.model), made


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a whole model's weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def metrics_rows(folder: Path) -> list[dict[str, float]]:
    """`metrics.jsonl` without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def engine_arguments(engine: str) -> dict[str, Any]:
    """A Trainer's arguments for `ddp`, `zero-N` or `fsdp2` on CPU ranks.

    Import `accelerate_on_cpu` first for the last two.
    """
    if engine == "ddp":
        return {}
    if engine == "fsdp2":
        layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {
            "use_cpu": False,
            "fsdp": True,
            "fsdp_config": {"version": 2, "fsdp_version": 2, **layers},
        }
    return {
        "use_cpu": False,
        "deepspeed": {
            "zero_optimization": {
                "stage": int(engine[-1]),
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    }


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's weights, whole on every rank, under any engine. Collectives: its own."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name] = whole.detach().clone()
    return found
