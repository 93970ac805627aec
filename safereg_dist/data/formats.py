"""Rows as users have them, read as conversations; `FORMATS` is the table of their forms.

A turn is as OpenAI writes it: `role` and `content`; an assistant's may call tools (`tool_calls`,
its `content` null or missing), and `train: false` or `weight: 0` takes the loss off it. A row may
offer `tools`, a list or its JSON text. A key that holds null counts as missing, as tables have it.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from safereg_dist.errors import DataError
from safereg_dist.storage.json_text import parse_json


class Conversation(NamedTuple):
    """The turns of one row."""

    messages: list[dict[str, Any]]
    """As a chat template takes them: `role`, `content` (text), where the row has them `tool_calls`
    (arguments as objects), and on turns of a tool `tool_call_id` and `name`."""
    tools: list[dict[str, Any]] | None
    """What the model is offered to call; None where that is nothing."""
    is_trained: list[bool]
    """One for each turn: True on the assistant turns that carry the loss."""

    def as_text(self) -> list[dict[str, str]]:
        """The turns with `role` and `content` alone, each tool call as a line of JSON after it."""
        return [{"role": m["role"], "content": _said(m)} for m in self.messages]


def _said(message: dict[str, Any]) -> str:
    calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls] if message["content"] or not calls else calls)


def conversation_of(row: dict[str, Any], where: str) -> Conversation:
    """The conversation of a row in one of `FORMATS`.

    Raises:
        DataError: the row fits none of them or several, a turn or a tool is malformed, or no
            assistant turn carries the loss; the message begins with `where`.
    """
    fitting = [keys for keys in FORMATS if all(row.get(key) is not None for key in keys)]
    if _ALPACA in fitting and _INPUT_OUTPUT in fitting:
        fitting.remove(_INPUT_OUTPUT)  # there `input` is the second half of the instruction
    if len(fitting) != 1:
        known, problem = fitting or FORMATS, f"found keys {sorted(row)}: add them"
        if fitting:
            problem = "found all of these: keep the keys of one"
        raise DataError(f"{where}: expected {', or '.join(map(_named, known))}, {problem}")
    turns = [_turn(given, where) for given in FORMATS[fitting[0]](row, where)]
    found = Conversation([m for m, _ in turns], _tools(row, where), [t for _, t in turns])
    if not any(m["role"] == "assistant" for m in found.messages):
        raise DataError(f"{where}: the conversation has no assistant turn: add one, the answer")
    if not any(found.is_trained):
        raise DataError(f"{where}: no assistant turn is trained (`train`, `weight`): leave one")
    return found


def chat_messages(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The row's `messages`, checked: a list of turns with string `role` and `content`.

    Raises:
        DataError: not a list of such turns, or a turn that calls a tool.
    """
    messages = [_turn(given, where)[0] for given in _list(row, "messages", where)]
    if any("tool_calls" in message for message in messages):
        raise DataError(f"{where}: a prompt with tool calls cannot be read here: remove them")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _named(keys: tuple[str, ...]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


# The formats: what becomes turns


def _messages(row: dict[str, Any], where: str) -> list[Any]:
    """The turns; where they end before the answer, `response` is it and alone carries the loss."""
    turns = _list(row, "messages", where)
    if not isinstance(row.get("response"), str) or _role(turns[-1]) in ("assistant", None):
        return turns
    return [*_untrained(turns), {"role": "assistant", "content": row["response"]}]


def _prompt_response(row: dict[str, Any], where: str) -> list[Any]:
    return _exchange(_text(row, "prompt", where), _text(row, "response", where))


def _input_output(row: dict[str, Any], where: str) -> list[Any]:
    return _exchange(_text(row, "input", where), _text(row, "output", where))


def _alpaca(row: dict[str, Any], where: str) -> list[Any]:
    asked = [_text(row, "instruction", where)]
    if row.get("input") not in (None, ""):
        asked.append(_text(row, "input", where))
    return _exchange("\n\n".join(asked), _text(row, "output", where))


def _prompt_completion(row: dict[str, Any], where: str) -> list[Any]:
    """Texts, or lists of turns; the loss is on the completion, whoever speaks in the prompt."""
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return _exchange(row["prompt"], row["completion"])
    if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
        raise DataError(
            f"{where}: `prompt` and `completion` must both be text or both be lists of turns: "
            "write them alike"
        )
    return _untrained(_list(row, "prompt", where)) + _list(row, "completion", where)


def _untrained(turns: list[Any]) -> list[Any]:
    return [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in turns]


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}


def _sharegpt(row: dict[str, Any], where: str) -> list[Any]:
    turns = []
    for given in _list(row, "conversations", where):
        ok = isinstance(given, dict) and isinstance(given.get("value"), str)
        if not ok or given.get("from") not in [*_SHAREGPT_ROLES]:
            said = given.get("from") if isinstance(given, dict) else given
            raise DataError(
                f"{where}: each of `conversations` needs text `value` and `from`, one of "
                f"{', '.join(_SHAREGPT_ROLES)}, got {said!r}: turns with `role` and `content` "
                "belong under `messages`"
            )
        turn = {key: given[key] for key in ("train", "weight") if key in given}
        turn |= {"role": _SHAREGPT_ROLES[given["from"]], "content": given["value"]}
        if given["from"] == "function_call":
            calls = _parsed(given["value"], "a function_call", where)
            turn |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        turns.append(turn)
    return turns


def _exchange(asked: str, answer: str) -> list[Any]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


_INPUT_OUTPUT = ("input", "output")
_ALPACA = ("instruction", "output")
FORMATS: dict[tuple[str, ...], Callable[[dict[str, Any], str], list[Any]]] = {
    ("messages",): _messages,
    ("prompt", "response"): _prompt_response,
    ("prompt", "completion"): _prompt_completion,
    _INPUT_OUTPUT: _input_output,
    _ALPACA: _alpaca,
    ("conversations",): _sharegpt,
}
"""The keys that a row has -> its turns as OpenAI writes them, not yet checked."""


# One turn


def _turn(given: Any, where: str) -> tuple[dict[str, Any], bool]:
    """The turn as a template takes it, and whether it carries the loss."""
    is_turn = isinstance(given, dict) and isinstance(given.get("role"), str)
    calls = given.get("tool_calls") if is_turn else None
    content = given.get("content", "" if calls else None) if is_turn else None
    content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise DataError(
            f"{where}: a turn must be an object with text `role` and `content`, got "
            f"{given!r:.80}: write it in the OpenAI chat format"
        )
    role = given["role"]
    turn: dict[str, Any] = {"role": role, "content": content}
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise DataError(f"{where}: `tool_calls` must be a list on an assistant turn: move it")
        turn["tool_calls"] = [_call(call, where) for call in calls]
    if role == "tool":
        turn |= {k: given[k] for k in ("tool_call_id", "name") if given.get(k) is not None}
    return turn, _is_trained(given, role, where)


def _is_trained(given: dict[str, Any], role: str, where: str) -> bool:
    train, weight = given.get("train"), given.get("weight")
    if not isinstance(train, bool | None):
        raise DataError(f"{where}: `train` of a turn must be true or false, got {train!r}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{where}: `weight` of a turn must be 0 or 1, got {weight!r}")
    said = {bool(value) for value in (train, weight) if value is not None}
    if len(said) > 1:
        raise DataError(f"{where}: `train` and `weight` of a turn disagree: keep one")
    if role != "assistant" and True in said:
        raise DataError(
            f"{where}: only assistant turns can be trained, this one is of {role!r}: remove "
            "`train` or `weight`"
        )
    return role == "assistant" and False not in said


def _call(given: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object: templates write those as JSON themselves."""
    function = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{where}: a tool call needs a function with text `name` and `arguments`, got "
            f"{given!r:.80}: write it in the OpenAI chat format"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"the arguments of {function['name']!r}", where)
    if not isinstance(arguments, dict | None):
        raise DataError(
            f"{where}: the arguments of {function['name']!r} must be a JSON object, got "
            f"{arguments!r:.80}: write them as one"
        )
    call_id = {"id": given["id"]} if given.get("id") is not None else {}
    named = {"name": function["name"], "arguments": arguments or {}}
    return {**call_id, "type": "function", "function": named}


def _tools(row: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "`tools`", where) if tools.strip() else None
    if tools in (None, []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{where}: `tools` must be a list of objects or its JSON text, got {tools!r:.80}"
        )
    return tools


def _list(row: dict[str, Any], key: str, where: str) -> list[Any]:
    if not isinstance(row[key], list) or not row[key]:
        raise DataError(
            f"{where}: `{key}` must be a non-empty list of turns, got {row[key]!r:.80}: write it "
            "as one"
        )
    return row[key]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{where}: `{key}` must be text, got {row[key]!r:.80}: write it as text")
    return row[key]


def _parsed(text: str, what: str, where: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as err:
        raise DataError(f"{where}: {what} is not JSON ({err.msg}): write it as JSON") from err
