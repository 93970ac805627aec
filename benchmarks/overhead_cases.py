"""What `bench_overhead.py` runs on: two model shapes, rows with an exact number of risky ones.

The rows of a step are the same in every arm and round. Those of the smaller step are listed by
what a random probe on the reference says of their prompts, riskiest first: so k risky rows are the
first k whatever the risk comes from, and a threshold between two probabilities finds exactly them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from world_runs import run_verb

from safereg_dist.config import (
    Config,
    DataConfig,
    ReferenceConfig,
    RegularizerConfig,
    RiskConfig,
    TrainConfig,
    config_to_yaml,
)
from safereg_dist.demo.base import HIDDEN_SIZE, NUM_LAYERS
from safereg_dist.demo.tokenizer import MAX_TOKENS, SPECIAL_TOKENS, build_tokenizer
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe, pool_prompt
from safereg_dist.storage.atomic import write_atomically

FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
LARGE_STEP, LARGE_FRACTION, LARGE_MICRO_BATCH_SIZE = 512, 0.01, 8
"""The step of the claim about bytes."""
PROMPT_TOKENS, RESPONSE_TOKENS = 18, 20
"""Of every row, chat marks included: where rows differ, padding makes a step cheaper or dearer by
chance, whoever trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A small Llama, and the optimizer step that it is measured on."""

    hidden: int
    layers: int
    heads: int
    vocab: int | None
    """None = the tokenizer's."""
    is_tied: bool
    """The head is the embedding."""
    rows_per_step: int
    """Over all ranks; 5 % of them is a whole number."""
    grad_accum_steps: int


MODELS = {
    # As demo/base.py builds it.
    "demo": Model(
        hidden=HIDDEN_SIZE,
        layers=NUM_LAYERS,
        heads=4,
        vocab=None,
        is_tied=True,
        rows_per_step=80,
        grad_accum_steps=4,
    ),
    # Matrix products dominate; a step is less than half a second on two cores.
    "wide": Model(
        hidden=512,
        layers=2,
        heads=8,
        vocab=2048,
        is_tied=False,
        rows_per_step=40,
        grad_accum_steps=2,
    ),
}
INITIALIZER_RANGE = 0.1
"""Wide enough that two random models disagree, so that the divergence weighs in the loss."""


def place_rows(
    num_rows: int, *, rank: int, world_size: int, micro_batch_size: int
) -> list[list[int]]:
    """Rows 0 .. num_rows - 1 dealt like cards: to ranks, and each rank's to its micro-batches.

    The risky rows come first: so ranks and micro-batches have as many of them as one another, give
    or take one.
    """
    own = list(range(rank, num_rows, world_size))
    count = -(-len(own) // micro_batch_size)
    return [own[m::count] for m in range(count)]


def model_shape(name: str, vocab_size: int) -> LlamaConfig:
    """The architecture of one of `MODELS`."""
    model = MODELS[name]
    return LlamaConfig(
        vocab_size=model.vocab or vocab_size,
        hidden_size=model.hidden,
        intermediate_size=model.hidden * 21 // 8,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=model.is_tied,
        initializer_range=INITIALIZER_RANGE,
        dtype="float32",
    )


def write_case(folder: Path, name: str) -> None:
    """Policy, a reference that differs from it, a probe on the reference, and the rows."""
    tokenizer = build_tokenizer()
    for seed, part in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        shape = model_shape(name, len(tokenizer))
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder / part)
        tokenizer.save_pretrained(folder / part)
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference").eval()
    probe = _random_probe(reference)
    probe.save(folder / "probe")
    scores = _write_rows(folder, MODELS[name].rows_per_step, probe, reference, tokenizer)
    write_atomically(folder / "scores.json", json.dumps(scores))


def store_reference(folder: Path, model: str) -> None:
    """Builds the stored reference of a case, in this process, by the command that users run."""
    config = arm_config(folder, model, "column", ranks=1)
    write_atomically(folder / "run.yaml", config_to_yaml(config))
    run_verb(
        *("reference", "build", folder / "run.yaml", "--out", folder / "store"),
        "engine.name=single",
    )


def _write_rows(
    folder: Path,
    rows_per_step: int,
    probe: Probe,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[float]:
    """Writes `rows.jsonl`; the probe's probability for the first `rows_per_step`, falling."""
    draw = torch.Generator().manual_seed(0)
    prompts = _texts(tokenizer, PROMPT_TOKENS - 3, draw)
    found = _scores(probe, reference, tokenizer, prompts[:rows_per_step])
    order = sorted(range(rows_per_step), key=lambda i: -found[i])
    prompts[:rows_per_step] = [prompts[i] for i in order]
    answers = _texts(tokenizer, RESPONSE_TOKENS - 1, draw)
    lines = [  # any row may be risky: the measured step says which are
        json.dumps({"id": f"row-{i:03d}", "prompt": prompt, "response": answer, "risk": 1.0})
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    write_atomically(folder / "rows.jsonl", "\n".join(lines) + "\n")
    return [found[i] for i in order]


def threshold_for(scores: Sequence[float], num_risky: int) -> float:
    """A threshold on the probe's probability that exactly the first `num_risky` rows reach.

    For none it is above 1: then it holds on the policy's states too, whose order is another one.
    """
    if num_risky == 0:
        return 2.0
    if num_risky == len(scores):
        return scores[-1] / 2
    return (scores[num_risky - 1] + scores[num_risky]) / 2


def arm_config(
    folder: Path, model: str, source: str, *, ranks: int, cache: Path | None = None
) -> Config:
    """The configuration of an arm; `source` is `none` (plain SFT) or where the risk comes from."""
    risk = {
        "none": RiskConfig(estimator="none"),
        "column": RiskConfig(estimator="column"),
        # The probe was fitted on the reference: `force` lets it read the policy.
        "probe-policy": RiskConfig(path=str(folder / "probe"), source="policy", force=True),
        "probe-reference": RiskConfig(path=str(folder / "probe"), cache="none"),
    }[source]
    step = MODELS[model]
    return Config(
        model=str(folder / "policy"),
        data=DataConfig(
            train=str(folder / "rows.jsonl"), max_length=PROMPT_TOKENS + RESPONSE_TOKENS
        ),
        reference=ReferenceConfig(
            model=str(folder / "reference"), cache=None if cache is None else str(cache)
        ),
        risk=risk,
        regularizer=RegularizerConfig(objective="none" if source == "none" else "convex"),
        train=TrainConfig(
            micro_batch_size=step.rows_per_step // (step.grad_accum_steps * ranks),
            grad_accum_steps=step.grad_accum_steps,
            precision="fp32",
        ),
        output_dir=str(folder / "run"),
    )


def _texts(tokenizer: PreTrainedTokenizerBase, words: int, draw: torch.Generator) -> list[str]:
    """A text of so many words for each row; a word is a token."""
    known = [w for w in sorted(tokenizer.get_vocab()) if w not in SPECIAL_TOKENS and w.isalpha()]
    drawn = torch.randint(len(known), (LARGE_STEP, words), generator=draw).tolist()
    return [" ".join(known[i] for i in row) for row in drawn]


def _random_probe(reference: PreTrainedModel) -> Probe:
    """A probe of random weights in the middle of the model, which tells any two prompts apart."""
    config = reference.config
    size = config.hidden_size
    return Probe(
        layer=config.num_hidden_layers // 2,
        pooling="mean_prompt",
        mean=torch.zeros(size),
        scale=torch.ones(size),
        weight=torch.randn(size, generator=torch.Generator().manual_seed(0)) / size**0.5,
        bias=0.0,
        threshold=0.5,
        fingerprint=model_fingerprint(reference),
    )


@torch.no_grad()
def _scores(
    probe: Probe,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
) -> list[float]:
    """The probe's probability for each prompt, one at a time, by plain transformers."""
    found = []
    for prompt in prompts:
        encoded: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        states = reference(**encoded, output_hidden_states=True).hidden_states[probe.layer]
        mask = encoded["attention_mask"]
        pooled = pool_prompt(states, mask.sum(1), pooling=probe.pooling, attention_mask=mask)
        found.append(float(probe.probability(pooled)[0]))
    return found
