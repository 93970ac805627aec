"""Prompts that are watched while a model trains: would it still refuse them?"""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from safereg_dist.config import EvalConfig, InfluenceConfig
from safereg_dist.data.collation import row_of
from safereg_dist.data.files import LabelledPrompt, read_prompts
from safereg_dist.data.rendering import first_response_token, render_prompts
from safereg_dist.data.tokenized import tokenize_row
from safereg_dist.errors import DataError
from safereg_dist.models.fingerprint import row_key
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


class Watched(NamedTuple):
    """What the source of risk `influence` watches, and what it is calibrated on."""

    refusing: list[Row]
    """Harmful prompts with the first tokens of a refusal as their response."""
    complying: list[Row]
    """The same prompts with the first tokens of an answer that complies."""
    benign: list[Row]
    """Benign rows, whole."""

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of all tokens, and of which of them are a response's."""
        keys = [" ".join(row_key(row.input_ids, row.loss_mask) for row in rows) for rows in self]
        return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def watched_rows(path: str, config: InfluenceConfig, tokenizer: PreTrainedTokenizerBase) -> Watched:
    """The first harmful prompts of a file, and its benign rows that have a `response`.

    Rows without a label count as harmful. All are tokenised as training rows are.

    Raises:
        DataError: the file is missing or malformed, holds no harmful prompt, or fewer benign rows
            than it takes to see the share `false_positives`; a row that cannot be tokenised.
    """
    prompts = read_prompts(Path(path))
    harmful = [p for p in prompts if p.label in (None, "harmful")][: config.prompts]
    benign = [p for p in prompts if p.label == "benign" and p.response]
    least = math.ceil(1 / config.false_positives)
    if not harmful or len(benign) < least:
        raise DataError(
            f"risk.path={path} holds {len(harmful)} harmful prompts and {len(benign)} benign rows "
            f"with a response: influence needs one harmful prompt or more, and {least} benign rows "
            f"to find the risk that at most {config.false_positives:g} of them reach "
            "(risk.influence.false_positives): add rows like those that you train on"
        )

    def row(prompt: LabelledPrompt, response: str) -> Row:
        answered = [*prompt.messages, {"role": "assistant", "content": response}]
        where = f"{path}, prompt {prompt.id!r}"
        return tokenize_row({"messages": answered}, where, tokenizer, default_id=prompt.id)

    def begun(prompt: LabelledPrompt, response: str) -> Row:
        whole = row(prompt, response)
        begin, answer = whole.prompt_ends[-1], sum(whole.loss_mask[whole.prompt_ends[-1] :])
        # Texts are how an answer begins: the token that ends the turn is none of it.
        end = begin + min(config.positions, max(answer - 1, 1))
        own = [0] * begin + whole.loss_mask[begin:end]
        return row_of(prompt.id, whole.input_ids[:end], own)

    return Watched(
        [begun(p, p.response or config.refusal) for p in harmful],
        [begun(p, p.complying or config.complying) for p in harmful],
        [row(p, p.response or "") for p in benign],
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
