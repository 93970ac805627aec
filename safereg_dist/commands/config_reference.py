"""All keys of the configuration with their facts, and the page that lists them.

`python -m safereg_dist.commands.config_reference > docs/configuration.md`
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from safereg_dist.config import Config
from safereg_dist.config.messages import choices_of, range_of, type_name
from safereg_dist.config.section import Place, Section, changes_result, place_in, section_in

HEAD = """# Configuration

Every key, its type, its default and its sentence, written by
`python -m safereg_dist.commands.config_reference` from `safereg_dist/config/`. `safereg config
explain KEY` says the same of one key, `safereg config init` writes a file to start from, and
`safereg config schema` the JSON schema for an editor. A run may go on from its checkpoint with
another value of a key marked *, which changes nothing in the weights that come out.

A relative path in the file begins at the file's folder, one in a `key=value` of the command line at
the working folder. A `path or id` that is no folder there is the id of a model on a hub.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key as its user sees it."""

    name: str
    """In full, e.g. `train.steps`."""
    type: str
    """Its choices, or the name of its type."""
    default: str
    """As YAML; `required` where there is none."""
    range: str
    """The constraint on its numbers; empty if the type has none."""
    sentence: str
    changes_result: bool


def sections(cls: type[Section] = Config, name: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Each section's full name (empty for the whole, `[]` after a list's) and its class."""
    yield name, cls
    for key, field in cls.model_fields.items():
        if (inner := section_in(field.annotation)) is not None:
            kind: Any = field.annotation
            is_one = get_origin(kind) is not tuple and inner in (kind, *get_args(kind))
            listed = "" if is_one else "[]"
            yield from sections(inner, f"{name}.{key}{listed}".lstrip("."))


def is_value(field: FieldInfo) -> bool:
    """True where a key holds a value, or may hold one in place of a list of sections."""
    return section_in(field.annotation) is None or str in get_args(field.annotation)


def keys_of(cls: type[Section], section: str) -> list[Key]:
    """The keys of a section that are values, in the order of the file."""
    return [
        _key(f"{section}.{name}".lstrip("."), field)
        for name, field in cls.model_fields.items()
        if is_value(field)
    ]


def _key(name: str, field: FieldInfo) -> Key:
    kind, mark = field.annotation, place_in(field)
    takes_null = type(None) in get_args(kind)
    named = [str(choice) for choice in choices_of(kind)] + ["null"] * takes_null
    default = "required" if field.is_required() else as_yaml(field.default)
    return Key(
        name=name,
        type=_type(kind, named, mark),
        default=default,
        range=f"must {range_of(field)}" if field.metadata and mark is None else "",
        sentence=" ".join((field.description or "").split()),
        changes_result=changes_result(field),
    )


def _type(kind: Any, choices: list[str], mark: Place | None) -> str:
    """In YAML's terms; of a text that names a file or a folder `path`, or `path or id`."""
    if mark is None:
        return " | ".join(choices) if choices_of(kind) else type_name(kind)
    return re.sub(r"\bstr\b", "path or id" if mark.may_be_id else "path", type_name(kind))


def as_yaml(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def sentence_of(cls: type[Section]) -> str:
    """The purpose of a section, from its docstring."""
    return " ".join((cls.__doc__ or "").split())


def reference() -> str:
    """The page of all keys, in Markdown."""
    parts = [HEAD]
    for name, cls in sections():
        title = f"`{name}`" if name else "The whole"
        parts.append(f"\n## {title}\n\n{sentence_of(cls)}\n\n")
        rows = [
            (f"`{k.name}`{'' if k.changes_result else ' *'}", k.type, f"`{k.default}`", k.sentence)
            for k in keys_of(cls, "")
        ]
        parts.append(markdown_table(("key", "type", "default", "meaning"), rows))
    return "".join(parts)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under their heads."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    first, *lines = [f"| {' | '.join(line)} |" for line in escaped]
    return "\n".join([first, "|" + "---|" * len(head), *lines, ""])


if __name__ == "__main__":
    print(reference(), end="")
