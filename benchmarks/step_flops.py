"""FLOPs of real training steps, with a probe and without, on small random models.

Matrix products are counted by torch's FlopCounterMode, taught the operators that it does not know
on a CPU. Counts are exact; nothing is timed. `tests/unit/test_probe_flops.py` holds them against
the count written out from a model's dimensions.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from safereg_dist.config import (
    Config,
    DataConfig,
    EngineConfig,
    RegularizerConfig,
    RiskConfig,
    TrainConfig,
)
from safereg_dist.demo.tokenizer import SPECIAL_TOKENS, build_tokenizer
from safereg_dist.factory import Run, build_run, start_backend
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.probe_lab.mlp import UNITS
from safereg_dist.profiling.operators import UNKNOWN_TO_TORCH
from safereg_dist.risk.probe import POOLINGS, Probe
from safereg_dist.trainer import optimizer_step
from safereg_dist.types import Row

MAX_EPOCHS = 10
"""Bound of the runs' row streams."""
NOT_COMPARED = 1
"""A step in which a watched probe does not ask the reference: it does in 0, drift_every, ..."""
_ATEN = torch.ops.aten


def counted(call: Callable[[], Any]) -> "Cost":
    """FLOPs of the matrix products, and elementwise work, of `call()`."""
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH)
    with counter, _Elements() as elements:
        call()
    return Cost(counter.get_total_flops(), elements.count)


class Cost(NamedTuple):
    """What some work costs."""

    flops: int
    """Of matrix products; a multiplication and an addition are two."""
    elements: int
    """Elements written by other operators, and read by reductions."""

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.flops - other.flops, self.elements - other.elements)


class _Elements(TorchDispatchMode):
    """Counts the elements that operators write (views write none), and that reductions read."""

    _REDUCTIONS = (_ATEN.sum, _ATEN.mean, _ATEN.argmax, _ATEN.amax)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(a.alias_info is not None for a in func._schema.returns) and not (
            func._schema.is_mutable
        )
        if isinstance(out, torch.Tensor) and not is_view:
            self.count += out.numel()
        if func.overloadpacket in self._REDUCTIONS:
            self.count += args[0].numel()
        return out


def llama(layers: int, hidden: int, *, vocab: int = 256) -> LlamaConfig:
    """A small Llama: heads of 64, an MLP of 8/3 of the width in multiples of 64."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=-(-8 * hidden // 192) * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Lengths of the rows of one epoch, in tokens, chat marks included."""

    name: str
    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    rows_per_batch: int

    @classmethod
    def equal(cls, share: float, *, length: int, count: int) -> "Rows":
        """`count` rows of one length, of which the prompt takes `share`; one micro-batch."""
        prompt = round(share * length)
        return cls(
            name="equal",
            prompts=(prompt,) * count,
            responses=(length - prompt,) * count,
            rows_per_batch=count,
        )

    @classmethod
    def ragged(cls, *, longest: int, count: int, rows_per_batch: int) -> "Rows":
        """Prompts and responses of 4 to `longest` / 2 tokens, drawn apart from each other."""
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(4, longest // 2 + 1, (2, count), generator=draw).tolist()
        return cls(
            name="ragged",
            prompts=tuple(lengths[0]),
            responses=tuple(lengths[1]),
            rows_per_batch=rows_per_batch,
        )


def write_run_folder(folder: Path, shape: LlamaConfig, rows: Rows) -> None:
    """A random model of this shape, the demo's tokenizer, and rows of exactly these lengths."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    vocabulary = tokenizer.get_vocab()
    words = [w for w in sorted(vocabulary) if w not in SPECIAL_TOKENS and w.isalpha()]
    draw = torch.Generator().manual_seed(0)

    def text(count: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (count,), generator=draw))

    lines = [
        # <bos><user> ... <assistant> are the prompt's marks, <eos> is the response's.
        json.dumps({"id": str(i), "prompt": text(p - 3), "response": text(r - 1)}) + "\n"
        for i, (p, r) in enumerate(zip(rows.prompts, rows.responses, strict=True))
    ]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def start_run(
    folder: Path,
    rows: Rows,
    *,
    side: str,
    k: int = 1,
    pooling: str = POOLINGS[0],
    kind: str = "linear",
) -> Run:
    """A run of one process on what `write_run_folder` wrote; `side` none has no probe.

    The threshold is 1, so that no row is active and the reference runs for the probe alone.
    """
    if side != "none":
        _random_probe(folder / "model", k, pooling, kind).save(folder / "probe")
    config = Config(
        model=str(folder / "model"),
        data=DataConfig(train=str(folder / "rows.jsonl")),
        risk=RiskConfig(estimator="none")
        if side == "none"
        else RiskConfig(path=str(folder / "probe"), source=side, cache="none"),
        regularizer=RegularizerConfig(threshold=1.0),
        train=TrainConfig(
            epochs=MAX_EPOCHS, micro_batch_size=rows.rows_per_batch, precision="fp32"
        ),
        engine=EngineConfig(name="single"),
        output_dir=str(folder / "run"),
    )
    return build_run(config, start_backend(config))


def _random_probe(model_folder: Path, k: int, pooling: str, kind: str) -> Probe:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    size = model.config.hidden_size
    hidden: dict[str, Any] = (
        {"hidden_weight": torch.randn(UNITS, size), "hidden_bias": torch.zeros(UNITS)}
        if kind == "mlp"
        else {}
    )
    return Probe(
        layer=k,
        pooling=pooling,
        kind=kind,
        mean=torch.zeros(size),
        scale=torch.ones(size),
        weight=torch.randn(UNITS if kind == "mlp" else size) / size,
        bias=0.0,
        threshold=0.5,
        fingerprint=model_fingerprint(model),
        **hidden,
    )


def epoch_costs(
    run: Run, epochs: int, *, is_watched: bool = False
) -> Iterator[tuple[Cost, "Tokens"]]:
    """Cost and tokens of each epoch, trained as `train` does.

    `is_watched` lets the policy-side probe compare itself with the reference when that is due.
    """
    steps = -(-len(run.sources.train) // run.sources.rows_per_step)
    for epoch in range(epochs):
        costs, tokens = [], []
        for step in range(epoch * steps, (epoch + 1) * steps):
            costs.append(_step_cost(run, step, is_watched=is_watched))
            tokens.append(_tokens_of(run.sources.rows_of_step(step)))
        yield (
            Cost(*map(sum, zip(*costs, strict=True))),
            Tokens(*map(sum, zip(*tokens, strict=True))),
        )


class Tokens(NamedTuple):
    """Tokens of some micro-batches: real ones, and what they are padded to."""

    real: int
    real_prompt: int
    padded: int
    padded_prompt: int


def _step_cost(run: Run, step: int, *, is_watched: bool) -> Cost:
    """Of a whole optimizer step; update and log have no product, and cancel in a difference."""
    rows = run.sources.rows_of_step(step)
    in_first_epoch = run.sources.in_first_epoch(step)
    number = step if is_watched else NOT_COMPARED

    def work() -> None:
        done = optimizer_step(run, rows, step=number, lr=1e-5, in_first_epoch=in_first_epoch)
        ran = done.totals.sums["reference_rows"]
        assert ran == 0, "the reference must run for the probe alone"

    return counted(work)


def _tokens_of(rows: list[Row]) -> Tokens:
    """Of one micro-batch."""
    lengths = [len(row.input_ids) for row in rows]
    prompts = [end for row in rows for end in row.prompt_ends]
    return Tokens(sum(lengths), sum(prompts), len(rows) * max(lengths), len(rows) * max(prompts))
