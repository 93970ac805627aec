"""Prompts as tokens, through a tokenizer's chat template."""

from typing import Any

from safereg_dist.data.chat_template import failures_named, rendered
from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import ConfigError, DataError


def render_prompts(tokenizer: Any, prompts: list[LabelledPrompt]) -> list[list[int]]:
    """Token ids of each prompt up to the point where the answer begins.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: the template refuses a prompt.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "expected a tokenizer with a chat template, found none: set `data.chat_template`, or "
            "save one with the tokenizer (chat_template.jinja)"
        )
    return [_ids(tokenizer, prompt.messages, prompt.id, generation=True) for prompt in prompts]


def _ids(
    tokenizer: Any, messages: list[dict[str, str]], name: str, *, generation: bool
) -> list[int]:
    where = f"prompt {name!r}"
    with failures_named(where):
        text = rendered(tokenizer, messages, where, add_generation_prompt=generation)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def first_response_token(tokenizer: Any, prompt: LabelledPrompt, response: str) -> int:
    """Id of the token with which `response` begins when it answers `prompt`.

    Found by rendering the answered conversation; where the template puts something else first (an
    empty block of thoughts), the response is tokenised by itself.
    """
    (start,) = render_prompts(tokenizer, [prompt])
    turns = [*prompt.messages, {"role": "assistant", "content": response}]
    full = _ids(tokenizer, turns, prompt.id, generation=False)
    if full[: len(start)] == start and len(full) > len(start):
        piece = tokenizer.decode([full[len(start)]]).strip().casefold()
        if piece and response.strip().casefold().startswith(piece):
            return full[len(start)]
    alone = tokenizer(response.strip(), add_special_tokens=False)["input_ids"]
    if not alone:
        raise DataError(f"the refusal for prompt {prompt.id!r} is empty: give its text")
    return alone[0]
