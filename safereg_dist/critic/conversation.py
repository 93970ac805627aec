"""Conversations as judges take them: text under judgement that cannot pose as anything else.

Two defences. Text goes where the format puts text: the content of its own turn, or one JSON string.
And marks are broken: a space is put behind every `<` that begins a tag or a control token
(`<|im_end|>` becomes `< |im_end|>`), behind the `[` of `[INST]` and `[End ...]`, and behind the `#`
of `#the...`; nothing is removed, so nothing can be assembled out of what is left. Servers render
chat templates to text before they tokenise, so otherwise `<|im_end|>` in the data ended the turn.
"""

import json
import re
from collections.abc import Iterator

from safereg_dist.critic.verdict import Messages

# U+FF5C is the bar in the control tokens of some model families.
_MARK = re.compile(r"<(?=[^\s=<\d])|\[(?=/?\s*INST|(?:Start|End) )|#(?=the)", re.IGNORECASE)
_FIELD = re.compile(r"^(?=(?:-{3}|={3}|[A-Z][A-Za-z]*(?: [A-Za-z]+){0,2} ?:))", re.MULTILINE)


def neutral(text: str) -> str:
    """The text with every mark of a chat format broken by a space."""
    return _MARK.sub(lambda mark: f"{mark[0]} ", text)


def quoted(text: str) -> str:
    """`neutral` text whose lines cannot pose as a field of a raw template either.

    A line that begins like a separator (`---`) or a field (`Answers:`) is moved in by a space.
    """
    return _FIELD.sub(" ", neutral(text))


def alternating(messages: Messages) -> Messages:
    """The conversation in user and assistant turns that alternate, beginning with the user.

    Guards' templates know no other roles: what a system, a tool or anyone else says goes into the
    user's turn with its role before it. Contents are `neutral`.
    """
    turns: Messages = [] if messages[0]["role"] != "assistant" else [_turn("user", "(nothing)")]
    for message in messages:
        role, content = message["role"], neutral(message["content"])
        if role not in ("user", "assistant"):
            role, content = "user", f"({neutral(role)}) {content}"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns.append(_turn(role, content))
    return turns


def up_to_each_answer(messages: Messages) -> Iterator[Messages]:
    """The conversation up to each assistant turn; whole where there is none.

    Guards judge the last turn they are shown, so every answer must be last once.
    """
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    for end in ends or [len(messages)]:
        yield messages[:end]


def prompt_and_response(messages: Messages) -> tuple[str, str]:
    """The last assistant turn and all that comes before it, both `quoted`; for raw templates."""
    *before, last = messages
    if last["role"] != "assistant":
        before, last = messages, _turn("assistant", "(nothing)")
    if len(before) == 1 and before[0]["role"] == "user":
        return quoted(before[0]["content"]), quoted(last["content"])
    said = (f"({neutral(turn['role'])}) {quoted(turn['content'])}" for turn in before)
    return "\n\n".join(said), quoted(last["content"])


def as_json(messages: Messages) -> str:
    """The conversation as a JSON list: no text can leave its string; contents are `neutral`."""
    turns = [_turn(neutral(m["role"]), neutral(m["content"])) for m in messages]
    return json.dumps(turns, ensure_ascii=False, indent=1)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
