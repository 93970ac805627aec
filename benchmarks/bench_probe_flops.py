"""Counts the probe's share of a training step's FLOPs, over the objects that training uses.

    python benchmarks/bench_probe_flops.py [--world FOLDER] [--out FOLDER]

What is claimed, and how it is counted:

- A step is forward and backward of the policy on real micro-batches, through `factory.build_run`
  with the engine `single`. Matrix products are counted by torch's FlopCounterMode, taught the
  operators that it does not know on a CPU (`counted`). Counts are exact; nothing is timed.
- The probe's cost is the difference to the same steps with `risk.estimator: none`. No row is
  active, so the reference runs for the probe alone.
- Reference side: (k / L) * (prompt share) / 3 of a step in the first epoch, nothing later, where
  the trunk dominates. Embeddings cost no product; the head costs 3 products of its own, over
  response tokens alone, and attention grows with the square of a row: both make a step dearer than
  the formula thinks, and so the share smaller.
- Policy side: no product at all, so every element that any operator writes, and that reductions
  read, counts as one operation.
- Real shapes (`kind` meta) have no memory: the trunks run on the meta device; the head, whose loss
  needs values, is its formula, which the real steps confirm to the last FLOP.

`tokens` are real ones, `padded` counts what the micro-batches hold: the machine pays for those.
With --world (see `safereg_dist.demo.world`) also what recall each layer's probe keeps there.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import installed, provenance, write_csv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from tqdm import tqdm
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, PretrainedConfig

from safereg_dist.batch import micro_batches
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
from safereg_dist.fingerprint import model_fingerprint
from safereg_dist.probe_lab.fit import fit_probe
from safereg_dist.reference import ReferenceTrunk
from safereg_dist.risk.probe import Probe, pool_prompt

RESULTS = Path(__file__).resolve().parent / "results" / "probe"
EPOCHS = (1, 3, 5)
COLUMNS = [
    *("date", "hardware", "commit", "torch", "transformers", "kind", "model", "L", "H", "V"),
    *("rows", "rows_per_batch", "side", "pooling", "k", "epochs", "tokens", "padded_tokens"),
    *("prompt_share", "padded_prompt_share", "probe_flops", "probe_elements", "step_flops"),
    *("head_share", "share", "formula", "padded_formula", "ratio_to_padded_formula"),
]
LAYER_COLUMNS = [
    *("date", "hardware", "commit", "torch", "transformers", "source", "k", "L", "recall"),
    *("false_positive_rate", "auroc", "threshold", "is_chosen", "cost_share"),
]
_ATEN = torch.ops.aten


def counted(call: Any) -> "Cost":
    """FLOPs of the matrix products, and elementwise work, of `call()`."""
    counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH)
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


def _addmm_flops(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _mv_flops(matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _cpu_attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _cpu_attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


_UNKNOWN_TO_TORCH = {
    _ATEN.addmm_: _addmm_flops,  # the gradient of the fused head's weight
    _ATEN.mv: _mv_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}
"""Left out by torch 2.13, which would make a CPU's step look cheaper than it is."""


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
    def ragged(cls, share: float, *, longest: int, count: int, rows_per_batch: int) -> "Rows":
        """Rows of different lengths, from a third of the longest up."""
        lengths = [longest - (2 * longest // 3) * i // max(count - 1, 1) for i in range(count)]
        prompts = tuple(max(4, round(share * length)) for length in lengths)
        return cls(
            name="ragged",
            prompts=prompts,
            responses=tuple(n - p for n, p in zip(lengths, prompts, strict=True)),
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
    folder: Path, rows: Rows, *, side: str, k: int = 1, pooling: str = "last_prompt_token"
) -> Run:
    """A run of one process on what `write_run_folder` wrote; `side` none has no probe.

    The threshold is 1, so that no row is active and the reference runs for the probe alone.
    """
    if side != "none":
        _random_probe(folder / "model", k, pooling).save(folder / "probe")
    config = Config(
        model=str(folder / "model"),
        data=DataConfig(train=str(folder / "rows.jsonl")),
        risk=RiskConfig(estimator="none")
        if side == "none"
        else RiskConfig(path=str(folder / "probe"), source=side, cache="none"),
        regularizer=RegularizerConfig(threshold=1.0),
        train=TrainConfig(
            epochs=max(EPOCHS), micro_batch_size=rows.rows_per_batch, precision="fp32"
        ),
        engine=EngineConfig(name="single"),
        output_dir=str(folder / "run"),
    )
    return build_run(config, start_backend(config))


def _random_probe(model_folder: Path, k: int, pooling: str) -> Probe:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    size = model.config.hidden_size
    return Probe(
        layer=k,
        pooling=pooling,
        mean=torch.zeros(size),
        scale=torch.ones(size),
        weight=torch.randn(size) / size,
        bias=0.0,
        threshold=0.5,
        fingerprint=model_fingerprint(model),
    )


def epoch_costs(run: Run, epochs: int) -> Iterator[tuple[Cost, "Tokens"]]:
    """Cost and tokens of each epoch, trained as `train` does."""
    size, count = run.sources.rows_per_step, len(run.sources.train)
    position = 0
    for _ in range(epochs):
        cost, tokens = Cost(0, 0), Tokens(0, 0, 0, 0)
        for _ in range(-(-count // size)):
            batches = micro_batches(
                run.sources.stream,
                start=position,
                micro_batch_size=run.config.train.micro_batch_size,
                count=1,
                pad_id=run.pad_id,
            )
            position += size
            step_cost, step_tokens = _step(run, batches[0])
            cost = Cost(*(a + b for a, b in zip(cost, step_cost, strict=True)))
            tokens = Tokens(*(a + b for a, b in zip(tokens, step_tokens, strict=True)))
        yield cost, tokens


class Tokens(NamedTuple):
    """Tokens of some micro-batches: real ones, and what they are padded to."""

    real: int
    real_prompt: int
    padded: int
    padded_prompt: int


def _step(run: Run, batch: Any) -> tuple[Cost, Tokens]:
    num_tokens = torch.tensor(float(batch.num_response_tokens))

    def work() -> None:
        output = run.engine(batch, num_tokens)
        assert output.reference_rows == 0, "the reference must run for the probe alone"
        run.engine.backward(output.loss, is_last=True)

    cost = counted(work)
    run.engine.update(1e-5)
    rows = len(batch.rows)
    tokens = Tokens(
        int(batch.attention_mask.sum()),
        sum(batch.prompt_ends),
        batch.input_ids.numel(),
        rows * max(batch.prompt_ends),
    )
    return cost, tokens


# ---- the grid


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


REAL_SHAPES: dict[str, PretrainedConfig] = {
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "Falcon-40B": FalconConfig(
        vocab_size=65024,
        hidden_size=8192,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_kv_heads=8,
        new_decoder_architecture=True,
        bias=False,
    ),
}
"""Dimensions as published with the models; weights are never made."""
SHARES = (0.25, 0.5, 0.75)


def small_rows() -> Iterator[dict[str, Any]]:
    """Real steps on the CPU: shapes, probed layers, prompt shares, sides, padding."""
    for layers, hidden in ((4, 256), (8, 384), (16, 512)):
        depths = (layers // 4, layers // 2, layers)
        for share in SHARES:
            rows = Rows.equal(share, length=64, count=4)
            yield from _case(llama(layers, hidden), rows, depths)
    shape = llama(8, 256)
    for rows_per_batch in (8, 1):
        rows = Rows.ragged(0.5, longest=72, count=8, rows_per_batch=rows_per_batch)
        yield from _case(shape, rows, (2, 4))
    # A head that weighs more than the trunk: where the formula no longer holds.
    yield from _case(llama(4, 256, vocab=32768), Rows.equal(0.5, length=64, count=4), (2,))


def _case(shape: LlamaConfig, rows: Rows, depths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows of the table for one model and one epoch's text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run_folder(folder, shape, rows)
        (plain, tokens), *_ = epoch_costs(start_run(folder, rows, side="none"), 1)
        facts = {
            "kind": "cpu",
            "model": f"Llama {shape.num_hidden_layers} x {shape.hidden_size}",
            "rows": rows.name,
            "rows_per_batch": rows.rows_per_batch,
            **_shape_facts(shape, plain.flops, sum(rows.responses)),
        }
        for k in depths:
            run = start_run(folder, rows, side="reference", k=k)
            probe = [cost - plain for cost, _ in epoch_costs(run, max(EPOCHS))]
            for epochs in EPOCHS:
                yield (
                    facts
                    | {"side": "reference", "pooling": "last_prompt_token"}
                    | shares(probe[:epochs], plain, tokens, k / shape.num_hidden_layers)
                    | {"k": k}
                )
        for pooling in ("last_prompt_token", "mean_prompt"):
            k = depths[0]
            run = start_run(folder, rows, side="policy", k=k, pooling=pooling)
            ((cost, _),) = epoch_costs(run, 1)
            yield (
                facts
                | {"side": "policy", "pooling": pooling}
                | shares([cost - plain], plain, tokens, None)
                | {"k": k}
            )


def _shape_facts(shape: PretrainedConfig, step_flops: int, response_tokens: int) -> dict[str, Any]:
    return {
        "L": shape.num_hidden_layers,
        "H": shape.hidden_size,
        "V": shape.vocab_size,
        "head_share": head_flops(shape, response_tokens) / step_flops,
    }


def head_flops(shape: PretrainedConfig, response_tokens: int) -> int:
    """3 products of the trained head: logits, gradient of the states, gradient of the weight."""
    return 3 * 2 * response_tokens * shape.hidden_size * shape.vocab_size


def shares(
    probe: Sequence[Cost], plain: Cost, tokens: Tokens, depth: float | None
) -> dict[str, Any]:
    """Columns of one side over as many epochs as `probe` has; `depth` is k / L, None = no formula.

    On the policy side, where no product is, elements count as operations.
    """
    epochs = len(probe)
    flops, elements = (sum(getattr(cost, name) for cost in probe) for name in Cost._fields)
    work = flops + elements if depth is None else flops
    row: dict[str, Any] = {
        "epochs": epochs,
        "tokens": tokens.real,
        "padded_tokens": tokens.padded,
        "prompt_share": tokens.real_prompt / tokens.real,
        "padded_prompt_share": tokens.padded_prompt / tokens.padded,
        "probe_flops": flops,
        "probe_elements": elements,
        "step_flops": plain.flops * epochs,
        "share": work / (plain.flops * epochs),
    }
    if depth is not None:
        row["formula"] = depth * row["prompt_share"] / 3 / epochs
        row["padded_formula"] = depth * row["padded_prompt_share"] / 3 / epochs
        row["ratio_to_padded_formula"] = row["share"] / row["padded_formula"]
    return row


def real_rows(length: int = 1024) -> Iterator[dict[str, Any]]:
    """Real shapes on the meta device: one row of `length` tokens; the trunks' own modules run."""
    for name, shape in REAL_SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                shape, dtype=torch.bfloat16, attn_implementation="eager"
            )
        trunk_cost = counted(lambda model=model: _train_trunk(model, length))
        for share in SHARES:
            prompt = round(share * length)
            responses = length - prompt
            plain = Cost(trunk_cost.flops + head_flops(shape, responses), 0)
            tokens = Tokens(length, prompt, length, prompt)
            facts = {"kind": "meta", "model": name, "rows": "equal", "rows_per_batch": 1}
            facts |= _shape_facts(shape, plain.flops, responses)
            layers = shape.num_hidden_layers
            for k in (layers // 4, layers // 2, layers):
                cost = counted(lambda model=model, n=prompt, k=k: _probe_prefix(model, n, k))
                yield (
                    facts
                    | {"side": "reference", "pooling": "last_prompt_token", "k": k}
                    | shares([cost], plain, tokens, k / layers)
                )
            for pooling in ("last_prompt_token", "mean_prompt"):
                cost = counted(lambda n=prompt, p=pooling, s=shape: _probe_states(s, length, n, p))
                yield (
                    facts
                    | {"side": "policy", "pooling": pooling}
                    | shares([cost], plain, tokens, None)
                )


def _meta_tokens(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    return ids, torch.ones_like(ids)


def _train_trunk(model: Any, length: int) -> None:
    ids, mask = _meta_tokens(length)
    trunk = model.base_model
    trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def _probe_prefix(model: Any, length: int, k: int) -> None:
    ReferenceTrunk(model)(*_meta_tokens(length), num_layers=k)


def _probe_states(shape: PretrainedConfig, length: int, prompt: int, pooling: str) -> None:
    def meta(*size: int) -> torch.Tensor:
        return torch.empty(*size, device="meta")

    hidden, size = meta(1, length, shape.hidden_size), shape.hidden_size
    probe = Probe(
        layer=1,
        pooling=pooling,
        mean=meta(size),
        scale=meta(size),
        weight=meta(size),
        bias=0.0,
        threshold=0.5,
        fingerprint="",
    )
    ends = torch.full((1,), prompt, device="meta")
    mask = _meta_tokens(length)[1]
    probe.probability(pool_prompt(hidden, ends, pooling=pooling, attention_mask=mask))


# ---- how early a layer keeps the recall


def world_rows(world: Path) -> list[dict[str, Any]]:
    """Recall on held-out prompts of the embedded world, of the probe on each layer."""
    with tempfile.TemporaryDirectory() as folder:
        report = fit_probe(world / "base", world / "probe.jsonl", Path(folder), progress=False)
    last = max(layer.layer for layer in report.layers)
    return [
        {
            "source": "demo world",
            "k": r.layer,
            "L": last,
            "recall": r.recall,
            "false_positive_rate": r.false_positive_rate,
            "auroc": r.auroc,
            "threshold": r.threshold,
            "is_chosen": r.layer == report.chosen.layer,
            "cost_share": r.layer / last / 3,
        }
        for r in report.layers
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """The first epoch of each case, as people read it."""
    print("model           side       k  prompt  head   share of a step  formula  ratio")
    for row in rows:
        if row["epochs"] == 1:
            formula = (
                f"{row['formula']:8.4%}  {row['ratio_to_padded_formula']:.3f}"
                if ("formula" in row)
                else ""
            )
            print(
                f"{row['model']:14s}  {row['side']:9s} {row.get('k', ''):>2}  "
                f"{row['prompt_share']:.0%}   {row['head_share']:5.1%}  {row['share']:12.5%}  "
                f"{formula}  {row['rows']}, {row['rows_per_batch']} a batch"
            )


def main() -> None:
    """Counts and writes `flops_share.csv`, and with --world `flops_layers.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, help="folder of safereg_dist.demo.world")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    common = {
        **{k: v for k, v in provenance(torch.device("cpu")).items() if k in COLUMNS},
        "transformers": installed("transformers"),
    }
    found = [*tqdm(real_rows(), desc="real shapes"), *tqdm(small_rows(), desc="real steps")]
    rows = [{**common, **row} for row in found]
    write_csv(rows, arguments.out / "flops_share.csv", COLUMNS)
    print_table(rows)
    if arguments.world is not None:
        layers = [{**common, **row} for row in world_rows(arguments.world)]
        write_csv(layers, arguments.out / "flops_layers.csv", LAYER_COLUMNS)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
