"""What a regularised model costs when it is used: nothing, since it is the same model.

    python benchmarks/inference.py SFT_MODEL MODEL [MODEL ...]

Folders that `safereg train` has exported, of arms of one run or sweep. Writes
results/inference.csv: whether each folder has the files (names and sizes), tensor names and
configuration of plain fine-tuning's, and its tokens per second over those of plain fine-tuning in
the same round: greedy decoding of a fixed number of tokens, models in random order in each round.
`sft again` is a second copy of the first folder: the noise.
"""

import csv
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import cell, provenance
from transformers import AutoModelForCausalLM

from safereg_dist.demo.claims import describe

RESULTS = Path(__file__).resolve().parent / "results" / "inference.csv"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 16, 16, 64, 15
COLUMNS = [
    *("date", "hardware", "commit", "torch", "arm", "same_files", "same_names", "same_config"),
    *("tokens_per_s", "ratio_to_sft", "ratio_q20", "ratio_q80", "rounds"),
]


def compare(folders: list[Path], *, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each folder, the first one's twice; arms are named by the folders around them."""
    models = {folder.resolve().parent.name: folder for folder in folders}
    sft = next(iter(models))
    known = {name: describe(folder) for name, folder in models.items()}
    loaded = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for name, folder in [*models.items(), ("sft again", folders[0])]
    }
    vocab = min(model.config.vocab_size for model in loaded.values())
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocab, (PROMPTS, PROMPT_TOKENS), generator=draw)
    rates = _rates(loaded, prompts, rounds)
    table = []
    for name, own in rates.items():
        ratios = [rate / other for rate, other in zip(own, rates[sft], strict=True)]
        fifths = statistics.quantiles(ratios, n=5, method="inclusive")
        described = known.get(name, known[sft])
        table.append(
            {
                "arm": name,
                "same_files": int(described["sizes"] == known[sft]["sizes"]),
                "same_names": int(described["names"] == known[sft]["names"]),
                "same_config": int(described["config"] == known[sft]["config"]),
                "tokens_per_s": statistics.median(own),
                "ratio_to_sft": statistics.median(ratios),
                **{"ratio_q20": fifths[0], "ratio_q80": fifths[3], "rounds": rounds},
            }
        )
    return table


def _rates(models: dict[str, Any], prompts: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each model in each round; a first one is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in models}
    chance, order = random.Random(0), list(models)
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    for _ in range(rounds + 1):
        chance.shuffle(order)
        for name in order:
            began = time.perf_counter()
            models[name].generate(prompts, attention_mask=torch.ones_like(prompts), **length)
            rates[name].append(PROMPTS * NEW_TOKENS / (time.perf_counter() - began))
    return {name: own[1:] for name, own in rates.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = compare([Path(word) for word in sys.argv[1:]])
    common = provenance(torch.device("cpu"))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in found:
            print(row)
            writer.writerow({key: cell(value) for key, value in {**common, **row}.items()})
