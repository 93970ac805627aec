"""Steps of models with adapters (PEFT): the cases, what they must give in float64, and our loop."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from safereg_dist import collate, prepare, row_of
from safereg_dist.types import Row
from support.builders import SCALED, VOCAB, tiny_model, tiny_scaled

STEPS, ROWS, MICRO_BATCHES, LR = 2, 8, 2, 0.05
CEILING, THRESHOLD = 0.7, 0.5
TARGETS = ["q_proj", "v_proj", "up_proj"]


@dataclass(frozen=True)
class Case:
    """A model with adapters, and which of them the reference has."""

    name: str
    family: str = "llama"
    tied: bool = False
    saved: tuple[str, ...] = ()
    """`modules_to_save` of every adapter: trained whole."""
    adapters: tuple[str, ...] = ("default",)
    active: tuple[str, ...] = ("default",)
    reference: str | None = None
    """The adapter that stays on in the reference."""
    frozen: tuple[str, ...] = ()
    """Adapters that are not trained."""


CASES = (
    Case("plain"),
    Case("head", saved=("lm_head",)),
    Case("embedding", saved=("embed_tokens",)),
    Case("tied", family="qwen", tied=True),
    Case("tied-embedding", tied=True, saved=("embed_tokens",)),
    Case("tied-head", tied=True, saved=("lm_head",)),
    Case("capped-head", family="gemma2", saved=("lm_head",)),
    Case("two", adapters=("default", "second"), active=("default", "second")),
    Case("inactive", adapters=("default", "idle")),
    Case("adapter", adapters=("default", "earlier"), reference="earlier"),
    Case(
        "frozen",
        adapters=("default", "aligned"),
        active=("aligned", "default"),
        reference="aligned",
        frozen=("aligned",),
    ),
    Case("adapter-head", saved=("lm_head",), adapters=("default", "earlier"), reference="earlier"),
)


def settings_of(case: Case) -> dict[str, Any]:
    """The safety settings of a case."""
    return {
        "reference": {"engine": "adapters_off", "adapter": case.reference},
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "regularizer": {"ceiling": CEILING, "threshold": THRESHOLD},
        "train": {"precision": "fp32"},
    }


def base_of(case: Case) -> Any:
    """The model of a case before it has adapters."""
    build = tiny_scaled if case.family in SCALED else tiny_model
    return build(case.family, tie_word_embeddings=case.tied)


def adapted(case: Case, names: tuple[str, ...] | None = None, *, base: Any = None) -> Any:
    """The PEFT model of a case, in float32; with `names` just those adapters, the first active.

    `base` is the model that gets them, by default that of the case.
    """
    chosen = case.adapters if names is None else names
    model = base_of(case) if base is None else base
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        modules_to_save=list(case.saved) or None,
        init_lora_weights=False,
        ensure_weight_tying=case.tied and "embed_tokens" in case.saved,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config, adapter_name=chosen[0])
    for name in chosen[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(case.active) if names is None else chosen[0])
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = 0.1 * torch.randn(parameter.shape, generator=draw)
            start = 0.0 if "lora_" in name else parameter.data
            parameter.data.copy_(start + noise)
            if any(f".{each}." in name for each in case.frozen):
                parameter.requires_grad_(False)
    return model.train()


def rows_of(step: int) -> list[Row]:
    """The rows of all ranks and micro-batches of a step; half of them are risky."""
    draw = torch.Generator().manual_seed(100 + step)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    rows = []
    for index in range(ROWS):
        length, prompt = number(6, 14), number(1, 4)
        ids = [number(6, VOCAB) for _ in range(length)]
        mask = [0] * prompt + [1] * (length - prompt)
        risk = number(0, 1001) / 1000
        rows.append(row_of(f"{step}-{index}", ids, mask, risk=risk))
    return rows


IDS = collate(rows_of(0)[:3], pad_id=0).input_ids
"""[3, S] tokens to look at states of."""


@dataclass
class Outcome:
    """What a run gave."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """Of the first step."""


def expected(case: Case, steps: int = STEPS) -> Outcome:
    """Losses and gradients from whole logits in float64; the reference is a model of its own."""
    policy = adapted(case).double().eval()
    if case.reference is None:
        reference: Any = base_of(case)
    else:
        reference = adapted(case, (case.reference,))
    return train_whole_logits(policy, reference.double().eval(), steps)


def train_whole_logits(policy: nn.Module, reference: nn.Module, steps: int) -> Outcome:
    """Steps of SGD on sum_t (1 - b) CE_t + b KL(reference || policy)_t, over N."""
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=LR)
    outcome = Outcome([], {})
    for step in range(steps):
        rows = rows_of(step)
        count = sum(sum(row.loss_mask[1:]) for row in rows)
        loss = torch.stack([_row_loss(policy, reference, row) for row in rows]).sum() / count
        loss.backward()
        outcome.losses.append(float(loss.detach()))
        if step == 0:
            outcome.gradients = {
                n: p.grad.clone() for n, p in trained.items() if p.grad is not None
            }
        optimizer.step()
        optimizer.zero_grad()
    return outcome


def _row_loss(policy: nn.Module, reference: nn.Module, row: Row) -> Tensor:
    ids = torch.tensor([row.input_ids])
    kept = torch.tensor(row.loss_mask[1:]).bool()
    own = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)[kept]
    with torch.no_grad():
        frozen = reference(input_ids=ids).logits[0, :-1].log_softmax(-1)[kept]
    ce = functional.nll_loss(own, ids[0, 1:][kept], reduction="sum")
    divergence = (frozen.exp() * (frozen - own)).sum()
    assert row.risk is not None
    b = CEILING if row.risk >= THRESHOLD else 0.0
    return (1 - b) * ce + b * divergence


class Alone:
    """One process, plain torch: an engine for `train`, and what others have of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward: Callable[..., Any] = model
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """SGD over what is trained."""
        return torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=LR)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradients."""
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        """Whole, by name."""
        return {
            name: p.grad.detach().clone()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(
    case: Case,
    engine_of: Callable[[nn.Module], Any] = Alone,
    *,
    model: Any = None,
    steps: int = STEPS,
    **how: Any,
) -> tuple[Outcome, Any, Any]:
    """What our own steps give, the regulariser and the model. Rows are dealt to ranks in turn."""
    model = adapted(case) if model is None else model
    regularizer = prepare(model, settings_of(case), **how)
    engine = engine_of(model)
    regularizer.bind(engine.forward)
    ranks = regularizer.ranks
    outcome = Outcome([], {})
    for step in range(steps):
        own = rows_of(step)[ranks.rank :: ranks.world_size]
        plan = regularizer.plan(own, step=step, micro_batches=MICRO_BATCHES)
        for planned in plan.micro_batches:
            batch = collate(planned.rows, pad_id=0)
            with regularizer.loss_of(planned, batch, plan):
                loss = engine.forward(input_ids=batch.input_ids, use_cache=False).logits
            engine.backward(loss * ranks.world_size, is_last=planned.is_last)
        if step == 0:
            outcome.gradients = engine.gradients()
        engine.update()
        outcome.losses.append(regularizer.close(plan).sums["loss"])
    return outcome, regularizer, model


def check(found: Outcome, wanted: Outcome, where: str) -> None:
    """Losses within 1e-5, every gradient within 1e-4 of its largest entry; none more, none less."""
    gap = torch.tensor(found.losses).double() / torch.tensor(wanted.losses).double() - 1
    assert float(gap.abs().max()) < 1e-5, (where, found.losses, wanted.losses)
    assert set(found.gradients) == set(wanted.gradients), where
    for name, gradient in wanted.gradients.items():
        scale = max(float(gradient.abs().max()), 1e-6)
        worst = float((found.gradients[name].double() - gradient).abs().max()) / scale
        assert worst < 1e-4, f"{where}: gradient of {name} is off by {worst:.1e}"


def quantised(folder, **how):
    """A tiny model that bitsandbytes has quantised, and the float32 model of what it holds."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    small = {"hidden_size": 64, "intermediate_size": 128}
    tiny_model(**small).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**how),
        device_map="cpu",
        dtype=torch.float32,
    )
    whole = tiny_model(**small)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weight = module.weight.data * module.weight.SCB[:, None] / 127
        else:
            continue
        whole.get_submodule(name).weight.data.copy_(weight)
    return model, whole


QUANTISED = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}
"""How bitsandbytes is asked for each kind."""
