"""Pydantic's errors in a configuration, as one line that names the key and the remedy."""

import difflib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from safereg_dist.config.checks import hint
from safereg_dist.config.section import Section, section_in

_RANK = {"extra_forbidden": 0, "invalid_key": 0, "missing": 2}  # the others are 1
_RANGE = "greater_than greater_than_equal less_than less_than_equal finite_number".split()


def first_mistake(error: ValidationError, cls: type[Section], raw: Any, where: str) -> str:
    """The first error in the order of the file; in a section, unknown keys before values."""
    at = {str(key): number for number, key in enumerate(raw)}
    found = error.errors()
    first = min(found, key=lambda e: (at.get(str(e["loc"][0]), len(at)), _RANK.get(e["type"], 1)))
    *parents, key = first["loc"]
    for parent in parents:  # down to the section that holds the key
        if parent in cls.model_fields:  # else an index, or a name in a mapping
            cls = section_in(cls.model_fields[parent].annotation) or cls
    name = _name(where, (*parents, str(key)))
    if _RANK.get(first["type"]) == 0:
        return unknown_key(name, str(key), list(cls.model_fields))
    if first["type"] == "missing":
        names = [_name(where, each["loc"]) for each in found if each["type"] == "missing"]
        return f"missing key {', '.join(names)}: add it to the configuration, or give key=value"
    if first["type"] in ("model_type", "tuple_type"):
        field = cls.model_fields.get(str(key))
        entries = " of sections" if field and section_in(field.annotation) else ""
        what = "a section of keys" if first["type"] == "model_type" else f"a list{entries}"
        return f"{name} must be {what}, got {first['input']!r}"
    if first["type"] in (*_RANGE, "literal_error"):
        name = _name(where, first["loc"], raw)
    if str(key) not in cls.model_fields:  # an entry of a list, or of a mapping
        wanted = first["msg"].removeprefix("Input should ")
        return f"{_name(where, first['loc'])} must {wanted}, got {first['input']!r}"
    return f"{name} must {_expected(first, cls.model_fields[str(key)])}"


def unknown_key(name: str, key: str, valid: Sequence[str]) -> str:
    """What is said of a key, in full its `name`, that is none of the `valid` ones: the nearest."""
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]
    return f"unknown key {name!r}: did you mean {near!r}? (valid here: {', '.join(valid)})"


def _name(where: str, place: tuple[Any, ...], raw: Any = None) -> str:
    """The full name of a key; list entries by category if `raw` has one, else by index."""
    for key in place:
        raw = raw[key] if isinstance(raw, dict | list | tuple) else None
        called = raw["category"] if isinstance(raw, dict) and "category" in raw else key
        where += f"[{called}]" if isinstance(key, int) else f".{key}"
    return where.lstrip(".")


def _expected(error: ErrorDetails, field: FieldInfo) -> str:
    value = error["input"]
    if value is None:
        return f"not be null: give a {type_name(field.annotation)}"
    if error["type"] in _RANGE:
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        text = f"{range_of(field)}, got {value}"
        return f"{text}: {extra['remedy']}" if "remedy" in extra else text
    if choices := [str(choice) for choice in choices_of(field.annotation)]:
        allowed = f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
        return f"be {allowed}, got {value!r}{hint(value, choices)}"
    if error["type"] == "string_pattern_mismatch":
        return f"match {error.get('ctx', {}).get('pattern')}, got {value!r}"
    return f"be {type_name(field.annotation)}, got {value!r}"


def range_of(field: FieldInfo) -> str:
    """The constraint on its numbers, e.g. `lie in [0, 1)`."""
    ge, gt, le, lt = (
        next((getattr(bound, name) for bound in field.metadata if hasattr(bound, name)), None)
        for name in ("ge", "gt", "le", "lt")
    )
    if le is not None or lt is not None:
        low, high = f"({gt}" if ge is None else f"[{ge}", f"{lt})" if le is None else f"{le}]"
        return f"lie in {low}, {high}"
    if gt is not None:
        return "be positive and finite"
    return "be finite" if ge is None else f"be finite and at least {ge}"


def choices_of(kind: Any) -> list[Any]:
    """The literal values in a type; empty if it has none."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for part in get_args(kind) for choice in choices_of(part)]


def type_name(kind: Any) -> str:
    """The name of a type in YAML terms, e.g. `int | null`."""
    if get_origin(kind) is Literal:
        return type(get_args(kind)[0]).__name__
    if kind in (None, type(None)):
        return "null"
    if get_origin(kind) is tuple:
        return "list"
    if get_origin(kind) is dict:
        return "mapping"
    return " | ".join(map(type_name, get_args(kind))) or kind.__name__
