"""Counts the probe's share of a training step's FLOPs, over the objects that training uses.

    python benchmarks/bench_probe_flops.py [--world FOLDER] [--out FOLDER]

What is claimed, and how it is counted:

- A step is forward and backward of the policy on real micro-batches, through `factory.build_run`
  with the engine `single`. Matrix products are counted by torch's FlopCounterMode, taught the
  operators that it does not know on a CPU (`step_flops`). Counts are exact; nothing is timed.
- The probe's cost is the difference to the same steps with `risk.estimator: none`. No row is
  active, so the reference runs for the probe alone.
- Reference side: (k / L) * (prompt share) / 3 of a step in the first epoch, nothing later, where
  the trunk dominates. Embeddings cost no product; the head costs 3 products of its own, over
  response tokens alone, and attention grows with the square of a row: both make a step dearer than
  the formula thinks, and so the share smaller.
- Policy side: hardly a product, so every element that any operator writes, and that reductions
  read, counts as one operation.
- A policy-side probe is watched by default (`risk.drift`): in one step of `risk.drift_every` the
  reference reads the same rows, unless it knows them; in all it pays no more than the formula once.
- Real shapes (`kind` meta) have no memory: the trunks run on the meta device; the head, whose loss
  needs values, is its formula, which the real steps confirm to the last FLOP.

`tokens` are real ones, `padded` counts what the micro-batches hold: the machine pays for those.
With --world (see `safereg_dist.demo.world`) also what recall each layer's probe keeps there.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import installed, provenance, write_csv
from real_shapes import REAL_SHAPES, RealModel
from step_flops import (
    Cost,
    Rows,
    Tokens,
    epoch_costs,
    llama,
    start_run,
    write_run_folder,
)
from tqdm import tqdm
from transformers import LlamaConfig, PretrainedConfig
from transformers.utils import logging

from safereg_dist.config import RiskConfig
from safereg_dist.probe_lab.fit import fit_probe
from safereg_dist.risk.probe import POOLINGS

RESULTS = Path(__file__).resolve().parent / "results" / "probe"
EPOCHS = (1, 3, 5)
DRIFT_EVERY = RiskConfig(estimator="none").drift_every
COLUMNS = [
    *("date", "hardware", "commit", "torch", "transformers", "kind", "model", "L", "H", "V"),
    *(
        "rows",
        "rows_per_batch",
        "side",
        "probe",
        "pooling",
        "k",
        "epochs",
        "tokens",
        "padded_tokens",
    ),
    *("prompt_share", "padded_prompt_share", "probe_flops", "probe_elements", "step_flops"),
    *("head_share", "share", "formula", "padded_formula", "ratio_to_padded_formula"),
]
LAYER_COLUMNS = [
    *("date", "hardware", "commit", "torch", "transformers", "source", "k", "L", "recall"),
    *("false_positive_rate", "auroc", "threshold", "is_chosen", "cost_share"),
]


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
        rows = Rows.ragged(longest=96, count=8, rows_per_batch=rows_per_batch)
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
        for row in _sides(folder, rows, plain, tokens, shape.num_hidden_layers, depths):
            yield facts | row


def _sides(
    folder: Path, rows: Rows, plain: Cost, tokens: Tokens, layers: int, depths: Sequence[int]
) -> Iterator[dict[str, Any]]:
    def extra(epochs: int, *, is_watched: bool = False, **options: Any) -> list[Cost]:
        run = start_run(folder, rows, **options)
        return [cost - plain for cost, _ in epoch_costs(run, epochs, is_watched=is_watched)]

    for k in depths:
        costs = extra(max(EPOCHS), side="reference", k=k)
        for epochs in EPOCHS:
            found = shares(costs[:epochs], plain, tokens, k / layers)
            yield {"side": "reference", "pooling": POOLINGS[0], "k": k, **found}
    k = depths[0]
    for pooling, kind in ((POOLINGS[0], "linear"), (POOLINGS[1], "linear"), (POOLINGS[1], "mlp")):
        costs = extra(1, side="policy", k=k, pooling=pooling, kind=kind)
        found = shares(costs, plain, tokens, None)
        yield {"side": "policy", "probe": kind, "pooling": pooling, "k": k, **found}
    if rows.rows_per_batch == len(rows.prompts):  # an epoch is a step: one in DRIFT_EVERY compares
        costs = extra(DRIFT_EVERY, side="policy", k=k, is_watched=True)
        found = shares(costs, plain, tokens, k / layers)
        yield {"side": f"policy, compared every {DRIFT_EVERY}", "k": k, **found}


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

    On the policy side, where hardly a product is, elements count as operations.
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


def real_rows() -> Iterator[dict[str, Any]]:
    """Real shapes on the meta device, one row each; the last is long for its width."""
    lengths = [(name, 1024, share) for name in REAL_SHAPES for share in SHARES]
    models = {name: RealModel(shape) for name, shape in REAL_SHAPES.items()}
    for name, length, share in [*lengths, ("Llama-3.1-8B", 16384, 0.5)]:
        model, prompt = models[name], round(share * length)
        responses, layers = length - prompt, model.shape.num_hidden_layers
        plain = Cost(model.trunk(length).flops + head_flops(model.shape, responses), 0)
        tokens = Tokens(length, prompt, length, prompt)
        facts = {"kind": "meta", "model": name, "rows": "equal", "rows_per_batch": 1}
        facts |= _shape_facts(model.shape, plain.flops, responses)
        for k in (layers // 4, layers // 2, layers):
            found = shares([model.prefix(prompt, k)], plain, tokens, k / layers)
            yield facts | {"side": "reference", "pooling": POOLINGS[0], "k": k, **found}
        for pooling in POOLINGS[:2]:
            found = shares([model.policy_probe(length, prompt, pooling)], plain, tokens, None)
            yield facts | {"side": "policy", "pooling": pooling, **found}


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
    """The first epoch of each case, and the mean step of a watched policy side."""
    print(
        "model           tokens  prompt  head   side                       k  share      of formula"
    )
    for row in rows:
        if row["side"] == "reference" and row["epochs"] > 1:
            continue
        ratio = row.get("ratio_to_padded_formula")
        print(
            f"{row['model']:14s} {row['tokens']:>7}  {row['padded_prompt_share']:6.0%} "
            f"{row['head_share']:5.1%}   {row['side']:26s} {row.get('k', ''):>2}  "
            f"{row['share']:9.5%}  {'' if ratio is None else f'{ratio:.3f}'}"
        )


def main() -> None:
    """Counts and writes `flops_share.csv`, and with --world `flops_layers.csv`."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--world", type=Path, help="folder of safereg_dist.demo.world")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
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
