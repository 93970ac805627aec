"""Rows of a labelled file as the laboratory reads them: tokens, and the span that a probe reads.

At the position `prompt` the span is the whole prompt, rendered up to where the answer begins. At
`response` the row holds prompt and answer, and the span is the last assistant turn, end-of-turn
token included: teacher-forced, as the reference sees it in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from safereg_dist.data import tokenize_row
from safereg_dist.data.files import LabelledPrompt, read_prompts
from safereg_dist.data.rendering import render_prompts
from safereg_dist.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedRow:
    """One row as tokens, with the span that is pooled."""

    id: str
    input_ids: list[int]
    first: int
    """First token of the span."""
    last: int
    """Its last token, included."""


def read_examples(path: Path, position: str) -> list[LabelledPrompt]:
    """The rows of a file; a conversation that ends with an assistant turn is split into both.

    Raises:
        DataError: a row that cannot be read, or without the answer that the position needs.
    """
    examples = [_split_answer(prompt) for prompt in read_prompts(path)]
    for example in examples:
        if not example.messages:
            raise DataError(f"{path}: row {example.id!r} has an answer but no prompt: add one")
        if position == "response" and not (
            isinstance(example.response, str) and example.response.strip()
        ):
            raise DataError(
                f"{path}: row {example.id!r} has no answer: at the response position each row "
                "needs `response` (text), or `messages` that end with an assistant turn"
            )
    return examples


def _split_answer(prompt: LabelledPrompt) -> LabelledPrompt:
    *before, last = prompt.messages
    if last["role"] != "assistant":
        return prompt
    return replace(prompt, messages=before, response=last["content"])


def check_labels(examples: Sequence[LabelledPrompt], source: Path) -> None:
    """Raises DataError where a row has no label or all have the same."""
    unlabelled = [p.id for p in examples if p.label is None]
    if unlabelled:
        raise DataError(
            f"{source}: {len(unlabelled)} rows have no `label`, the first is {unlabelled[0]!r}: "
            "label each harmful or benign"
        )
    harmful = sum(p.label == "harmful" for p in examples)
    if not 0 < harmful < len(examples):
        raise DataError(
            f"{source} has {harmful} harmful rows of {len(examples)}: a probe needs both kinds"
        )


def read_background(path: Path, position: str) -> list[LabelledPrompt]:
    """Rows of the user's own that are benign by declaration.

    Raises:
        DataError: as `read_examples`, or a row is labelled harmful.
    """
    examples = read_examples(path, position)
    harmful = next((e.id for e in examples if e.label == "harmful"), None)
    if harmful is not None:
        raise DataError(
            f"{path}: row {harmful!r} is labelled harmful, background rows are benign: move it to "
            "--data"
        )
    return [replace(example, label="benign") for example in examples]


def tokenize_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[LabelledPrompt],
    position: str,
    *,
    max_length: int | None,
) -> list[ProbedRow]:
    """The rows as tokens, in order.

    Args:
        max_length: most tokens of a row, e.g. the positions the model has; None = any number.
    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: a row that the template refuses, or one longer than `max_length`.
    """
    if position == "prompt":
        rows = [
            ProbedRow(id=example.id, input_ids=ids, first=0, last=len(ids) - 1)
            for example, ids in zip(
                examples, render_prompts(tokenizer, list(examples)), strict=True
            )
        ]
    else:
        rows = [_answered(tokenizer, example) for example in examples]
    longest = max(rows, key=lambda row: len(row.input_ids))
    if max_length is not None and len(longest.input_ids) > max_length:
        raise DataError(
            f"prompt {longest.id!r} has {len(longest.input_ids)} tokens, the limit is "
            f"{max_length}: shorten or remove it"
        )
    return rows


def _answered(tokenizer: PreTrainedTokenizerBase, example: LabelledPrompt) -> ProbedRow:
    answer = {"role": "assistant", "content": example.response}
    row = tokenize_row(
        {"messages": [*example.messages, answer]},
        f"row {example.id!r}",
        tokenizer,
        default_id=example.id,
    )
    last = max(place for place, kept in enumerate(row.loss_mask) if kept)
    return ProbedRow(id=row.id, input_ids=row.input_ids, first=row.prompt_ends[-1], last=last)
