"""From YAML and `key.sub=value` overrides to a `Config`, refusing what it does not know."""

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from safereg_dist.config.messages import first_mistake
from safereg_dist.config.paths import Origin
from safereg_dist.config.section import Section
from safereg_dist.config.sections import Config
from safereg_dist.config.yaml_text import parse_yaml, read_yaml
from safereg_dist.errors import ConfigError

S = TypeVar("S", bound=Section)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key.sub=value` overrides applied, in order.

    Relative paths in the file begin at its folder, those of overrides at the working folder.

    Raises:
        ConfigError: missing file, unknown key (the nearest valid name is suggested), wrong type,
            value out of range, or an impossible combination.
    """
    return config_from_dict(_placed(_read(Path(path)), Path(path), overrides))


def load_run_config(path: Path | str) -> Config:
    """The configuration that a run has written to its folder, its paths as they were written.

    Raises:
        ConfigError: as `load_config`.
    """
    return config_from_dict(_read(Path(path)))


def _read(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise ConfigError(f"expected a configuration file, found none at {path}: check the path")
    try:
        raw = read_yaml(path)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(err).split())}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, found {type(raw).__name__}")
    return raw


def _placed(raw: dict[Any, Any], path: Path, overrides: Sequence[str]) -> dict[Any, Any]:
    """The values of a file with absolute paths and with overrides, which are not looked for."""
    replaced = frozenset(override.partition("=")[0] for override in overrides)
    raw = Origin.of_file(path, replaced).section(Config, raw)
    for override in overrides:
        _apply_override(raw, placed_override(override, Origin.here()))
    return raw


def placed_override(override: str, origin: Origin) -> str:
    """An override whose relative paths begin at the origin, which may not be the working folder.

    Raises:
        ConfigError: it is none, or a file is missing (`Origin.section`).
    """
    raw: dict[Any, Any] = {}
    _apply_override(raw, override)
    placed, key = origin.section(Config, raw), override.partition("=")[0]
    before, now = (reduce(getitem, key.split("."), each) for each in (raw, placed))
    return override if now == before else f"{key}={json.dumps(now)}"  # JSON is YAML


def config_from_dict(raw: Mapping[str, Any]) -> Config:
    """The configuration of a nested mapping; raises ConfigError like `load_config`."""
    return section_from_dict(Config, raw)


def section_from_dict(cls: type[S], raw: Mapping[str, Any], where: str = "") -> S:
    """A section of the values that a user gives; `where` it belongs is named in a ConfigError."""
    try:
        return cls.model_validate(dict(raw))
    except ValidationError as err:
        raise ConfigError(first_mistake(err, cls, raw, where)) from err


def replace(section: S, **changes: Any) -> S:
    """The same section with other values for some keys, checked as when it was read."""
    return section_from_dict(type(section), {**dict(section), **changes})


def config_to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `load_run_config` of it gives an equal object."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _apply_override(raw: dict[Any, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must read key=value, e.g. train.steps=100")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    try:
        node[leaf] = parse_yaml(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from err
