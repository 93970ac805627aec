"""What all sections of the configuration share: frozen, strict models with a sentence a field."""

from contextlib import suppress
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

ASIDE: dict[str, Any] = {"changes_result": False}
"""Mark of a key (`json_schema_extra`) on which the trained weights do not depend: paths, saving,
time limits. A run may resume with another value of it."""

LATER: dict[str, Any] = {"is_later": True}
"""Mark of a key that came after version 0.1: runs of before go on, since at its default it does not
count where configurations are compared."""


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


def is_section(kind: Any) -> bool:
    """True if a field of this type is itself a section."""
    return isinstance(kind, type) and issubclass(kind, Section)


def changes_result(field: FieldInfo) -> bool:
    """False where a field bears the mark `ASIDE`."""
    extra = field.json_schema_extra
    return not isinstance(extra, dict) or bool(extra.get("changes_result", True))


def counts(field: FieldInfo, value: Any) -> bool:
    """True if two runs with different values of the field are different runs."""
    extra = field.json_schema_extra
    is_later = isinstance(extra, dict) and bool(extra.get("is_later"))
    return changes_result(field) and not (is_later and value == field.default)
