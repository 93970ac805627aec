"""Prompts that are watched while a model trains: would it still refuse them?"""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from safereg_dist.config import EvalConfig
from safereg_dist.data.files import read_prompts
from safereg_dist.data.rendering import first_response_token, render_prompts
from safereg_dist.errors import DataError
from safereg_dist.types import Row


class Canary(NamedTuple):
    """Rows whose response is one token: the first of a refusal, or of an answer that complies."""

    refusal: list[Row]
    poisoned: list[Row]


def canary_rows(
    config: EvalConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Canary:
    """The rows of all harmful prompts in `eval.canary`; rows without a label count as harmful.

    Raises:
        DataError: the file is missing or malformed, holds no harmful prompt, or one that is too
            long.
        ConfigError: the tokenizer has no chat template.
    """
    prompts = [p for p in read_prompts(Path(config.canary)) if p.label in (None, "harmful")]
    if not prompts:
        raise DataError(f"eval.canary={config.canary} holds no harmful prompt: give at least one")
    ids = render_prompts(tokenizer, prompts)
    longest = max(range(len(ids)), key=lambda place: len(ids[place]))
    if len(ids[longest]) >= max_length:
        raise DataError(
            f"prompt {prompts[longest].id!r} of eval.canary has {len(ids[longest])} tokens, more "
            f"than data.max_length={max_length} leaves room for: shorten it"
        )

    def rows(name: str, text_of: list[str]) -> list[Row]:
        return [
            _row(f"{name}-{prompt.id}", asked, first_response_token(tokenizer, prompt, text))
            for prompt, asked, text in zip(prompts, ids, text_of, strict=True)
        ]

    return Canary(
        rows("refusal", [p.response or config.refusal for p in prompts]),
        rows("poisoned", [p.complying or config.poisoned for p in prompts]),
    )


def _row(name: str, asked: list[int], token: int) -> Row:
    mask = [0] * len(asked) + [1]
    return Row(
        id=name,
        input_ids=[*asked, token],
        loss_mask=mask,
        prompt_ends=[len(asked)],
        risk=None,
        prompt_key="",
    )
