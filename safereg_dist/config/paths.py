"""Where the paths of a configuration begin: in a file at its folder, elsewhere at the working one.

Which keys name a path is said by a mark of their field (`section.Place`), here is what it means.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from safereg_dist.config.section import Place, Section, place_in, section_in
from safereg_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Origin:
    """A folder that relative paths begin at."""

    folder: Path
    file: Path | None = None
    """The file that names them; None = the command line, or a program."""
    replaced: frozenset[str] = frozenset()
    """Keys of the file, in full, that others replace: theirs are not looked for."""

    @classmethod
    def of_file(cls, file: Path | str, replaced: frozenset[str] = frozenset()) -> "Origin":
        """That of the paths in a file: its folder."""
        return cls(Path(os.path.abspath(file)).parent, Path(file), replaced)

    @classmethod
    def here(cls) -> "Origin":
        """The working folder."""
        return cls(Path.cwd())

    def section(self, cls: type[Section], raw: Any, where: str = "") -> Any:
        """The values of a section with absolute paths; what does not fit the section is kept.

        Args:
            where: the name of the section, for errors.
        Raises:
            ConfigError: a file that is missing in the folder, and lies in the working folder.
        """
        if not isinstance(raw, Mapping):
            return raw
        found = dict(raw)
        for key, field in cls.model_fields.items():
            mark, inner = place_in(field), section_in(field.annotation)
            if key not in raw and (mark is None or not isinstance(field.default, str)):
                continue
            value, name = raw.get(key, field.default), f"{where}.{key}".lstrip(".")
            if get_origin(field.annotation) is dict and isinstance(value, Mapping):
                named = {k: self._value(v, mark, inner, f"{name}.{k}") for k, v in value.items()}
                found[key] = named
            else:
                found[key] = self._value(value, mark, inner, name)
        return found

    def _value(self, value: Any, mark: Place | None, inner: type[Section] | None, name: str) -> Any:
        if name in self.replaced:
            return value
        if isinstance(value, list | tuple):
            listed = (self._value(v, mark, inner, f"{name}[{i}]") for i, v in enumerate(value))
            return type(value)(listed)
        if isinstance(value, Mapping) and inner is not None:
            return self.section(inner, value, name)
        if isinstance(value, str) and mark is not None:
            return self.path(value, mark, name)
        return value

    def path(self, text: str, mark: Place, name: str) -> str:
        """One path, absolute; the id of a model and other words as they are.

        Raises:
            ConfigError: as `section`.
        """
        if not text or "\0" in text or re.fullmatch(mark.words, text):
            return text
        there, here = self.folder / text, Path.cwd() / text
        if mark.is_written or there == here or os.path.exists(there):
            is_path = mark.is_written or not mark.may_be_id or os.path.exists(there)
        elif os.path.exists(here):
            raise ConfigError(
                f"{name} is {text!r}, and paths in {self.file} begin at its folder: expected "
                f"{os.path.normpath(there)}, found none, but {os.path.normpath(here)} is there: "
                f"write {os.path.relpath(here, self.folder)}, or give {name}={text} on the "
                "command line, where paths begin at the working folder"
            )
        else:
            is_path = not mark.may_be_id
        is_path = is_path or text.startswith((".", os.sep))
        return os.path.normpath(there) if is_path else text
