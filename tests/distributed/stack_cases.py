"""One training run for every stack: its models, its rows, and what it must give, in float64."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from support.builders import (
    EXPERTS,
    SCALED,
    VOCAB,
    random_rows,
    tiny_experts,
    tiny_model,
    tiny_scaled,
    word_tokenizer,
    write_jsonl,
)
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

STEPS = 20
ROWS_PER_STEP = 24
LR = 1e-3
THRESHOLD = 0.5
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "init_lora_weights": False,
    "task_type": "CAUSAL_LM",
}
ALIGNED_SCALING = 2.0


@dataclass(frozen=True)
class Example:
    """A row as a stack's data set has it; -100 marks the prompt."""

    input_ids: list[int]
    labels: list[int]
    risk: float

    def feature(self, index: int) -> dict:
        """The row of a data set."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "attention_mask": [1] * len(self.input_ids),
            "risk": self.risk,
            "id": f"row-{index}",
        }


@cache
def examples(length: int | None = None) -> list[Example]:
    """The rows of all steps, in order; half of them are risky. `length`: that of every row."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found = []
    for _ in range(STEPS * ROWS_PER_STEP):
        drawn, prompt = draw(8, 20), draw(2, 6)
        ids = [draw(6, VOCAB) for _ in range(length or drawn)]
        risk = draw(0, 1001) / 1000
        found.append(Example(ids, [-100] * prompt + ids[prompt:], risk))
    return found


def write_models(folder: Path, family: str = "llama", **changes) -> None:
    """`policy` and `reference`, two Hugging Face folders with one tokenizer."""
    build = tiny_experts if family in EXPERTS else tiny_model
    build = tiny_scaled if family in SCALED else build
    for name, seed in (("policy", 0), ("reference", 5)):
        build(family, seed=seed, **changes).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    if family == "llama":
        with_adapters(tiny_model(family, seed=0)).save_pretrained(folder / "adapter")
        write_aligned(tiny_model(family, seed=0), folder / "aligned")
    write_jsonl(folder / "any.jsonl", random_rows(30, seed=1))


def with_adapters(model: PreTrainedModel):
    """The model with LoRA adapters that are not zero, the same wherever it is called."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(**LORA))
    values = adapter_values(model)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and parameter.numel():
            parameter.data.copy_(values(name, parameter.shape))
    return adapted


def write_aligned(model: PreTrainedModel, folder: Path) -> None:
    """An adapter that was trained before, with dropout, of another rank and on other layers."""
    from peft import LoraConfig, get_peft_model

    own = {"r": 3, "lora_alpha": 3 * ALIGNED_SCALING, "target_modules": ["q_proj", "down_proj"]}
    how = LORA | own | {"lora_dropout": 0.5}
    adapted = get_peft_model(model, LoraConfig(**how))
    generator = torch.Generator().manual_seed(9)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)


def aligned(folder: Path) -> PreTrainedModel:
    """The policy in float64 with the weights of `write_aligned` in its own: W + scaling B A."""
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64)
    stored = load_file(folder / "aligned" / "adapter_model.safetensors")
    for name, down in stored.items():
        if "lora_A" in name:
            up = stored[name.replace("lora_A", "lora_B")]
            layer = model.get_submodule(name.removeprefix("base_model.model.").split(".lora_")[0])
            layer.weight.data += ALIGNED_SCALING * (up.double() @ down.double())
    return model


def adapter_values(model: PreTrainedModel):
    """Values of an adapter's weight by its name: independent of the order of creation."""

    def of(name: str, shape: torch.Size) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name.split("layers.")[-1])))
        return 0.1 * torch.randn(shape, generator=generator)

    return of


def expected(
    folder: Path,
    *,
    lora: bool = False,
    on_aligned: bool = False,
    repeats: bool = False,
    steps: int = STEPS,
    rows_routed: int = 0,
) -> dict:
    """Losses of all steps and the gradients of the first, from whole logits in float64.

    `repeats`: each step has the rows of the first one. `rows_routed`: rows of a micro-batch, of
    which the routers of a mixture of experts have a loss of their own; 0 = it is not added.
    `on_aligned`: policy and reference are both the model that an earlier adapter has aligned.
    """
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(
        folder / ("policy" if lora else "reference"), dtype=torch.float64
    )
    if on_aligned:
        policy, reference = aligned(folder), aligned(folder)
    if lora:
        policy = with_adapters(policy).double()
    for model in (policy, reference):
        if model.config.model_type in EXPERTS:
            model.set_experts_implementation("eager")  # torch groups no products in float64
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    losses, gradients = [], {}
    for step in range(steps):
        first = 0 if repeats else step * ROWS_PER_STEP
        rows = examples()[first : first + ROWS_PER_STEP]
        count = sum(label != -100 for row in rows for label in row.labels[1:])
        loss = sum(_row_loss(policy, reference, row) for row in rows) / count
        if rows_routed:
            loss = loss + _router_loss(policy, rows, rows_routed)
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 0:
            gradients = {
                plain_name(n): p.grad.clone()
                for n, p in policy.named_parameters()
                if p.requires_grad
            }
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients}


def _row_loss(policy, reference, row: Example) -> torch.Tensor:
    """sum_t (1 - b) CE_t + b KL(reference || policy)_t over the response, b = [risk >= 1/2]."""
    ids = torch.tensor([row.input_ids])
    is_risky = row.risk >= THRESHOLD
    own = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)
    labels = torch.tensor(row.labels[1:])
    is_response = labels != -100
    if not is_risky:
        return functional.nll_loss(own[is_response], labels[is_response], reduction="sum")
    with torch.no_grad():
        frozen = reference(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return (frozen.exp() * (frozen - own)).sum(-1)[is_response].sum()


def _router_loss(policy, rows: list[Example], size: int) -> torch.Tensor:
    """The mean over micro-batches of the routers' loss, over tokens that are no padding."""
    found = []
    for first in range(0, len(rows), size):
        batch = [torch.tensor(row.input_ids) for row in rows[first : first + size]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        lengths = torch.tensor([len(row) for row in batch])[:, None]
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        outputs = policy(input_ids=ids, attention_mask=mask, output_router_logits=True)
        found.append(outputs.aux_loss)
    return policy.config.router_aux_loss_coef * torch.stack(found).mean()


def plain_name(name: str) -> str:
    """A parameter's name without what engines and PEFT put around it."""
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        while name.startswith(prefix):
            name = name.removeprefix(prefix)
    return name.replace("._orig_mod", "").replace("_checkpoint_wrapped_module.", "")


def write_expected(folder: Path, found: dict, name: str) -> None:
    """Keeps what `expected` gave beside the models."""
    losses = torch.tensor(found["losses"], dtype=torch.float64)
    save_file({"losses": losses, **found["gradients"]}, folder / f"{name}.safetensors")


def read_result(path: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(losses, gradients of the first step)."""
    tensors = load_file(path)
    losses = tensors.pop("losses")
    return losses.double(), {name: tensor.double() for name, tensor in tensors.items()}


class StackRun(NamedTuple):
    """One run of a stack: a row of the table."""

    stack: str
    ranks: int
    accumulation: int
    library: str
    """The package whose version the table names."""
    reference: str
    """What runs the reference."""

    @property
    def oracle(self) -> str:
        """The file that holds what it must give."""
        if "lora" in self.stack:
            return "lora"
        return "packed" if self.stack.endswith("packed") else "full"


def _runs() -> list[StackRun]:
    """Every stack, most on two ranks; some on three, and where weights are sharded on four."""
    own, zero = "adapters off", "zero-3 inference"
    table = [
        ("single", 1, "torch", "whole"),
        ("deepspeed-zero-1", 2, "deepspeed", "fsdp2"),
        ("deepspeed-zero-2", 2, "deepspeed", "fsdp2"),
        ("deepspeed-zero-3", 2, "deepspeed", zero),
        ("fsdp2", 2, "torch", "fsdp2"),
        ("train-zero-1", 2, "deepspeed", "fsdp2"),
        ("train-zero-2", 2, "deepspeed", "fsdp2"),
        ("trainer-ddp", 2, "transformers", "fsdp2"),
        ("trainer-zero-1", 2, "transformers", "fsdp2"),
        ("trainer-zero-2", 2, "transformers", "fsdp2"),
        ("trainer-zero-3", 2, "transformers", zero),
        ("trainer-fsdp2", 2, "transformers", "fsdp2"),
        ("sfttrainer", 1, "trl", "whole"),
        ("sfttrainer-packed", 1, "trl", "whole"),
        ("lora-single", 1, "peft", own),
        ("lora-ddp", 2, "peft", own),
        ("lora-zero-2", 2, "peft", own),
        ("lora-zero-3", 2, "peft", own),
        ("lora-fsdp2", 2, "peft", own),
        ("train-lora-single", 1, "peft", own),
        ("train-lora-zero-2", 2, "peft", own),
        ("train-lora-zero-3", 2, "peft", own),
        ("train-lora-fsdp2", 2, "peft", own),
        ("raw", 1, "torch", "whole"),
        ("raw-ddp", 2, "torch", "fsdp2"),
        ("raw-deepspeed", 2, "deepspeed", "fsdp2"),
        ("raw-fsdp2", 2, "torch", "fsdp2"),
        ("accelerate-loop", 2, "accelerate", "fsdp2"),
    ]
    on_three = ("deepspeed-zero-3", "fsdp2", "trainer-zero-3", "trainer-fsdp2", "raw-fsdp2")
    on_four = ("deepspeed-zero-3", "fsdp2", "trainer-zero-3", "trainer-fsdp2", "lora-zero-3")
    on_four = (*on_four, "lora-fsdp2")

    def ranks_of(stack: str, usual: int, accumulation: int) -> list[int]:
        more = [(3, on_three), (4, on_four)] if accumulation == 1 else []
        return [usual, *(count for count, stacks in more if stack in stacks)]

    return [
        StackRun(stack, count, accumulation, library, reference)
        for stack, ranks, library, reference in table
        for accumulation in (1, 4)
        for count in ranks_of(stack, ranks, accumulation)
    ]


RUNS = _runs()
FROZEN = (
    StackRun("train-lora-frozen-single", 1, 4, "peft", "aligned"),
    StackRun("train-lora-frozen-zero-2", 2, 1, "peft", "aligned"),
    StackRun("train-lora-frozen-zero-3", 2, 4, "peft", "aligned"),
    StackRun("train-lora-frozen-fsdp2", 2, 1, "peft", "aligned"),
)
"""A new adapter beside a frozen one, with which the model is the reference."""


class Errors(NamedTuple):
    """How far a run is from what it must give."""

    first_loss: float
    """Relative error of the first loss."""
    gradient: float
    """Largest relative error of a parameter's gradient, in its own norm."""
    last_loss: float
    """Relative error of the last loss."""
    missing: set[str]
    """Names of gradients that only one of the two has."""


def compared(result: Path, oracle: Path) -> Errors:
    """A worker's result against the oracle's."""
    losses, gradients = read_result(result)
    wanted, wanted_gradients = read_result(oracle)
    relative = (losses - wanted[: len(losses)]).abs() / wanted[: len(losses)]
    errors = [
        float((gradients[name] - want).norm() / want.norm())
        for name, want in wanted_gradients.items()
        if name in gradients
    ]
    missing = gradients.keys() ^ wanted_gradients.keys()
    return Errors(float(relative[0]), max(errors), float(relative[-1]), set(missing))


def check_run(out: Path, found: dict) -> None:
    """Losses within 1e-6 and first gradients within 1e-5 of what `expected` gave."""
    losses, gradients = read_result(out)
    wanted = torch.tensor(found["losses"], dtype=torch.float64)
    gap = float((losses / wanted - 1).abs().max())
    assert gap < 1e-6, f"losses are off by {gap:.1e}: {losses.tolist()}, {wanted.tolist()}"
    assert set(gradients) == set(found["gradients"])
    for name, gradient in found["gradients"].items():
        scale = max(float(gradient.abs().max()), 1e-6)
        worst = float((gradients[name] - gradient).abs().max()) / scale
        assert worst < 1e-5, f"gradient of {name} is off by {worst:.1e}"
