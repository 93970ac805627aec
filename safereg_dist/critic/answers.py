"""How a judge's answer is read: strictly, or not at all.

An `Answer` is the text that the judge generated and nothing else, so no text under judgement can be
taken for a verdict. Formats match all of it against a grammar; whatever does not match (garbage,
nothing, half an answer, a refusal to judge, two verdicts) raises `MalformedAnswer`.

The score comes from the deciding token, the one that begins the label: over the labels l that its
alternatives name, score = sum_l p_l value_l / sum_l p_l; for two labels with values 0 and 1 that is
the softmax of both. Where the endpoint gives no alternatives, it is the value of the label itself.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class MalformedAnswer(Exception):  # noqa: N818 - the condition is the name
    """No verdict of the format; the message says why and quotes nothing."""


class Token(NamedTuple):
    """A generated token and the log-probabilities of its likeliest alternatives."""

    text: str
    alternatives: dict[str, float]


class Answer(NamedTuple):
    """What the judge generated."""

    text: str
    is_cut: bool
    """True where the limit of tokens ended it."""
    tokens: tuple[Token, ...] = ()
    """In order; empty where the endpoint gives no log-probabilities."""


class Judgement(NamedTuple):
    """A score in [0, 1] and the kind of harm, where the format names it."""

    score: float
    category: str | None = None


def read_reply(reply: Any, *, is_chat: bool) -> Answer:
    """The one answer in the body of a reply (`chat/completions` or `completions`).

    Raises:
        MalformedAnswer: it holds no answer or several, or the judge or a filter refused.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise MalformedAnswer("no single choice in the reply")
    choice = choices[0]
    text = _chat_text(choice) if is_chat else choice.get("text")
    if not isinstance(text, str) or not text.strip():
        raise MalformedAnswer("empty answer")
    reason = choice.get("finish_reason")
    if reason not in (None, "stop", "length"):
        raise MalformedAnswer("the endpoint ended the answer itself")
    tokens = _chat_tokens(choice) if is_chat else _completion_tokens(choice)
    return Answer(text, reason == "length", tokens)


def _chat_text(choice: dict) -> Any:
    message = choice.get("message")
    if not isinstance(message, dict):
        raise MalformedAnswer("no message in the reply")
    if message.get("refusal"):
        raise MalformedAnswer("the judge refused to judge")
    return message.get("content")


def _chat_tokens(choice: dict) -> tuple[Token, ...]:
    listed: Any = choice.get("logprobs") or {}
    try:
        return tuple(
            Token(t["token"], {a["token"]: float(a["logprob"]) for a in t["top_logprobs"]})
            for t in listed.get("content") or ()
        )
    except (TypeError, KeyError, ValueError, AttributeError) as err:
        raise MalformedAnswer("log-probabilities of another form") from err


def _completion_tokens(choice: dict) -> tuple[Token, ...]:
    listed: Any = choice.get("logprobs") or {}
    try:
        texts, tops = listed.get("tokens") or [], listed.get("top_logprobs") or []
        pairs: Any = zip(texts, tops, strict=True)
        return tuple(Token(t, {a: float(p) for a, p in (top or {}).items()}) for t, top in pairs)
    except (TypeError, ValueError, AttributeError) as err:
        raise MalformedAnswer("log-probabilities of another form") from err


def score_of(answer: Answer, label: str, start: int, values: Mapping[str, float]) -> float:
    """The expected value of the label that `answer.text[start:]` begins with, in [0, 1].

    Args:
        label: the label that was read there, one of `values`.
        values: label -> its value.
    """
    token = _token_at(answer, start)
    if token is None:
        return values[label]
    chances = dict.fromkeys(values, 0.0)
    for text, logprob in token.alternatives.items():
        named = named_label(text, values)
        if named is not None and not math.isnan(logprob):
            chances[named] += math.exp(min(logprob, 0.0))
    if sum(chance > 0 for chance in chances.values()) < 2:
        return values[label]  # nothing to weigh it against: all others are beyond the alternatives
    total = sum(chances.values())
    return min(1.0, sum(chances[l] * values[l] for l in values) / total)


def named_label(token: str, labels: Mapping[str, float]) -> str | None:
    """The one label that begins with this token, letter case and spaces apart; else None."""
    text = token.strip().lower()
    named = [label for label in labels if text and label.lower().startswith(text)]
    return named[0] if len(named) == 1 else None


def _token_at(answer: Answer, start: int) -> Token | None:
    """The token that generated the character at `start`; None where the tokens are another text."""
    text = "".join(token.text for token in answer.tokens)
    # Servers may strip the text, or keep the end-of-turn token among the tokens.
    shift = text.find(answer.text)
    if shift < 0:
        return None
    end = 0
    for token in answer.tokens:
        end += len(token.text)
        if end > start + shift:
            return token
    return None
