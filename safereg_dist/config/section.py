"""What all sections of the configuration share: frozen, strict models with a sentence a field."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic.fields import FieldInfo

ASIDE: dict[str, Any] = {"changes_result": False}
"""Mark of a key (`json_schema_extra`) on which the trained weights do not depend: paths, saving,
time limits. A run may resume with another value of it."""
NEWER: dict[str, Any] = {"omitted_at_default": True}
"""Mark of a key that earlier versions did not have: at its default it is left out of the file and
the hash of a configuration, so that runs of those versions go on."""


@dataclass(frozen=True, slots=True)
class Place:
    """Mark of a key that names a file or a folder: `Annotated[str, READ]` (see `paths`)."""

    may_be_id: bool = False
    """A name that is no file here is one of a hub."""
    is_written: bool = False
    """It need not be there before the run."""
    words: str = "hub:.*"
    """What is no path (a regular expression)."""


READ = Place()
"""Mark of a file or a folder that is there before the run."""
WRITTEN = Place(is_written=True, words="none")
"""Mark of one that the run makes; `none` = no such file."""
MODEL = Place(may_be_id=True)
"""Mark of a folder, or the id of a model on a hub."""


class Section(BaseModel):
    """A section of the configuration; the text under a field is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any, info: ValidationInfo) -> Any:
        """What YAML means: an empty section, a list, a number like 1e-5 that it reads as text."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if value is None and is_section(kind):
            return {}
        if get_origin(kind) is tuple and isinstance(value, list | None):
            return tuple(value or ())
        if isinstance(value, str) and float in (kind, *get_args(kind)):
            with suppress(ValueError):
                return float(value)
        return value

    @model_serializer(mode="wrap")
    def _without_newer(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        written = write(self).items()
        return {k: v for k, v in written if not is_omitted(fields[k], getattr(self, k))}


def is_section(kind: Any) -> bool:
    """True if a field of this type is itself a section."""
    return isinstance(kind, type) and issubclass(kind, Section)


def section_in(kind: Any) -> type[Section] | None:
    """The section that a key of this type holds, or holds a list of; None where it is a value."""
    for choice in (kind, *get_args(kind)):  # a value may stand for the list, null for the section
        inner = get_args(choice)[0] if get_origin(choice) is tuple else choice
        if is_section(inner):
            return inner
    return None


def place_in(field: FieldInfo) -> Place | None:
    """The mark of a key that names a file or a folder; None where it does not."""
    return next((mark for mark in field.metadata if isinstance(mark, Place)), None)


def changes_result(field: FieldInfo) -> bool:
    """False where a field bears the mark `ASIDE`."""
    extra = field.json_schema_extra
    return not isinstance(extra, dict) or bool(extra.get("changes_result", True))


def is_omitted(field: FieldInfo, value: Any) -> bool:
    """True where a field bears the mark `NEWER` and has its default."""
    extra = field.json_schema_extra
    is_newer = isinstance(extra, dict) and bool(extra.get("omitted_at_default", False))
    return is_newer and value == field.default
