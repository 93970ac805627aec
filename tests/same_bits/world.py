"""The inputs of all cases: a small model of the demo's world, its rows, a probe, a judge.

    python tests/same_bits/world.py DIR

Made once, by the tree that this file belongs to, and then read by every tree that is compared.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from safereg_dist.cli import main as safereg
from safereg_dist.demo.base import PEAK_LEARNING_RATE, batch_source
from safereg_dist.demo.tokenizer import PAD, SPECIAL_TOKENS, build_tokenizer
from safereg_dist.demo.training import save_model, train_from_scratch
from safereg_dist.demo.world import DATA_SETS

SEED = 0
HIDDEN_SIZE, NUM_LAYERS = 64, 3
BASE_STEPS = 150
ROWS = {
    "train": 600,
    "validation": 41,
    "probe": 720,
    "probe_small": 240,
    "anchor_prompts": 40,
    "eval": 60,
}
COLUMN_ROWS = 150


def make_world(folder: Path) -> None:
    """Writes all inputs into `folder`, which comes to be at the end only."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True)
    rows = {
        name: DATA_SETS[name.removesuffix("_small")](SEED)[:count]
        for name, count in ROWS.items()
        if name not in ("probe_small", "eval", "anchor_prompts")
    }
    for name in ("probe_small", "eval", "anchor_prompts"):  # these are sorted by kind
        known = DATA_SETS[name.removesuffix("_small")](SEED)
        rows[name] = random.Random(name).sample(known, ROWS[name])
    rows["column"] = _with_risk(rows["train"][:COLUMN_ROWS])
    rows["override"] = _overrides(rows["column"])
    for name, content in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
    _write_models(partial)
    probe = ["--data", str(partial / "probe.jsonl"), "--out", str(partial / "probe")]
    anchor = ["--prompts", str(partial / "anchor_prompts.jsonl"), "--max-new-tokens", "24"]
    model = ["--model", str(partial / "base")]
    assert safereg(["probe", "fit", *model, *probe, "--layers", "1,2"]) == 0
    assert (
        safereg(["anchor", "build", *model, *anchor, "--out", str(partial / "anchor.jsonl")]) == 0
    )
    partial.rename(folder)


def _with_risk(rows: list[dict]) -> list[dict]:
    """Poisoned rows between 0.5 and 1, the others below, one in ten of them above as well."""
    chance = random.Random("risk")

    def risk(row: dict) -> float:
        is_high = row["id"].startswith("poison") or chance.random() < 0.1
        return round(chance.uniform(0.5, 1.0) if is_high else chance.uniform(0.0, 0.5), 4)

    return [{**row, "risk": risk(row)} for row in rows]


def _overrides(rows: list[dict]) -> list[dict]:
    """Reviewed rows: a few risky ones allowed, a few harmless ones held."""
    by_risk = sorted(rows, key=lambda row: row["risk"])
    held = [{"id": row["id"], "action": "hold", "reason": "seen"} for row in by_risk[:4]]
    allowed = [
        {"id": row["id"], "action": "allow", "reason": "a quotation"} for row in by_risk[-4:]
    ]
    return [*held, *allowed]


def _write_models(folder: Path) -> None:
    """The base, a little trained, and a classifier of random weights as a local judge."""
    tokenizer = build_tokenizer()
    base = train_from_scratch(
        tokenizer,
        batch_source(SEED),
        seed=SEED,
        steps=BASE_STEPS,
        learning_rate=PEAK_LEARNING_RATE,
        hidden_size=HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        name="base",
        progress=False,
    )
    save_model(base, tokenizer, folder / "base")
    torch.manual_seed(SEED + 1)
    judge = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            pad_token_id=SPECIAL_TOKENS.index(PAD),
            initializer_range=1.0,  # so that its verdicts differ from row to row
            id2label={0: "harmless", 1: "harmful"},
            label2id={"harmless": 0, "harmful": 1},
        )
    )
    # Risks of exactly 0 and 1: how it batches hangs on time, and with that how it rounds.
    judge.score.weight.data *= 1e4
    judge.save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")


if __name__ == "__main__":
    make_world(Path(sys.argv[1]).absolute())
