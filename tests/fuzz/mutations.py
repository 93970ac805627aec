"""Hostile versions of a file: what an attacker or a broken disk makes of it, by a given seed."""

import json
import random
from collections.abc import Callable
from typing import Any

RAW = "@raw@"
"""Before a text that stands in the file as it is, where JSON has no value for it."""
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 0.5, -0.0, 1e-300, 1e300),
    *(
        "",
        "x",
        " ",
        "0",
        "true",
        "null",
        "nan",
        "../../x",
        "/dev/zero",
        "/dev/null",
        "\x00",
        "\x1b",
    ),
    *("\x1b[2J\x1b]0;title\x07", "\u202egnp.exe", "\ud800", "a\nb", "%s%n", "{{ 1/0 }}", "${HOME}"),
    *("w1 " * 5000, "x" * 200_000, "w1", "user", "assistant", "hub:x", "hub:/tmp@a"),
    *([], {}, [None], [[]], {"": None}, [1, "a", None], {"a": {"b": []}}, [{}], ["x" * 1000] * 50),
    *(f"{RAW}{'9' * 6000}", f"{RAW}{'9' * 4000}", f"{RAW}NaN", f"{RAW}-Infinity", f"{RAW}1e999"),
    *(f"{RAW}{'[' * 5000}{']' * 5000}", f"{RAW}{'[' * 200_000}", RAW + '{"a":' * 3000),
)
YAML_NASTY = (
    *(
        "2001-99-99",
        "0b_",
        "0x_",
        "9" * 5000,
        "[" * 3000,
        "&a [*a]",
        "*a",
        "!!python/object:os.x {}",
    ),
    *(
        "!!int x",
        "!!timestamp x",
        "!!bool x",
        "!!binary x",
        "!!set {x}",
        "? ? ?",
        "- - -",
        "|\n x",
        ">",
    ),
    *(
        "{a: &b [1,1,1], c: [*b,*b]}",
        "1:99:99",
        "@",
        "`",
        "%TAG",
        "---\n...\n---",
        "\t",
        "'",
        '"\\ud800"',
    ),
    *("!!float x", "<<: 1", "{<<: [1]}", "0o_", "1_", "._", ".inf", ".nan", "~", "=", "2001-01-01"),
)
Mutate = Callable[[bytes, random.Random], bytes]


def of_bytes(content: bytes, chance: random.Random) -> bytes:
    """One to four changes of bytes: flips, cuts, insertions, copies, swaps, zeros."""
    found = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(found) + 1), chance.choice((1, 1, 2, 8, 64, 4096))
        other = chance.randrange(len(found) + 1)
        match chance.randrange(7):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1:
                del found[at:]
            case 2:
                found[at:at] = chance.randbytes(size)
            case 3:
                del found[at : at + size]
            case 4:
                found[at:at] = found[other : other + size]
            case 5:
                found[at : at + size] = found[other : other + size]
            case _:
                found[at : at + size] = bytes(min(size, len(found) - at))
    return bytes(found)


def of_json(content: bytes, chance: random.Random) -> bytes:
    """A value, a key or the whole replaced by one of `NASTY`."""
    value = json.loads(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = _changed(value, chance)
    return _text(value).encode("utf-8", "surrogatepass")


def of_lines(content: bytes, chance: random.Random) -> bytes:
    """One line of a JSONL file as `of_json`, or `of_bytes` over all of it."""
    if chance.random() < 0.3:
        return of_bytes(content, chance)
    lines = content.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = of_json(lines[at], chance)
    return b"\n".join(lines) + b"\n"


def of_either(content: bytes, chance: random.Random) -> bytes:
    """`of_json` or `of_bytes`."""
    return (of_bytes if chance.random() < 0.3 else of_json)(content, chance)


def of_yaml(content: bytes, chance: random.Random) -> bytes:
    """`of_either` on YAML that is written as JSON, or a value that only YAML has."""
    if chance.random() < 0.6:
        return of_either(content, chance)
    keys = json.loads(content)
    key = chance.choice(sorted(keys))
    nasty = chance.choice(YAML_NASTY)
    lines = [f"{k}: {nasty if k == key else json.dumps(v)}" for k, v in keys.items()]
    return "\n".join(lines).encode()


def _changed(value: Any, chance: random.Random) -> Any:
    """The value with one place in it changed."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.1:
        return chance.choice(NASTY)
    if isinstance(value, list):
        at = chance.randrange(len(value))
        return [*value[:at], _changed(value[at], chance), *value[at + 1 :]]
    key = chance.choice(sorted(value))
    match chance.randrange(8):
        case 0:
            return {k: v for k, v in value.items() if k != key}
        case 1:
            return {**value, str(chance.choice(NASTY))[:40]: chance.choice(NASTY)}
        case _:
            return {**value, key: _changed(value[key], chance)}


def _text(value: Any) -> str:
    if isinstance(value, str) and value.startswith(RAW):
        return value.removeprefix(RAW)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value)
