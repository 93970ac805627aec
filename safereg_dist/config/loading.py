"""From YAML and `key.sub=value` overrides to a `Config`, refusing what it does not know."""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from safereg_dist.config.checks import one_of
from safereg_dist.config.sections import PRESETS, Config
from safereg_dist.errors import ConfigError


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key.sub=value` overrides applied, in order.

    Raises:
        ConfigError: missing file, unknown key (the nearest valid name is suggested), wrong type,
            value out of range, or an impossible combination.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"expected a configuration file, found none at {path}: check the path")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(err).split())}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return config_from_dict(raw)


def config_from_dict(raw: Mapping[str, Any]) -> Config:
    """The configuration of a nested mapping; raises ConfigError like `load_config`."""
    raw = dict(raw)
    regularizer = raw.get("regularizer")
    if isinstance(regularizer, dict) and regularizer.get("preset") is not None:
        preset = regularizer["preset"]
        one_of("regularizer.preset", preset, tuple(PRESETS))
        raw["regularizer"] = {**PRESETS[preset], **regularizer}
    return _build(Config, raw, "")


def config_to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal object."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _apply_override(raw: dict[str, Any], override: str) -> None:
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
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from err


def _build(cls: Any, raw: Any, where: str) -> Any:
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be a section of keys, got {raw!r}")
    known = {f.name: f for f in fields(cls)}
    hints = get_type_hints(cls)
    for key in raw:
        if key not in known:
            raise ConfigError(_unknown_key(f"{where}.{key}".lstrip("."), str(key), list(known)))
    values = {}
    for key, value in raw.items():
        hint = hints[key]
        name = f"{where}.{key}".lstrip(".")
        values[key] = _value(hint, value, name)
    missing = [f.name for f in known.values() if _is_required(f) and f.name not in values]
    if missing:
        names = ", ".join(f"{where}.{name}".lstrip(".") for name in missing)
        raise ConfigError(f"missing key {names}: add it to the configuration")
    return cls(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, name)
    if get_origin(hint) is tuple:  # a list of sections
        if value is not None and not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list of sections, got {value!r}")
        item = get_args(hint)[0]
        return tuple(_build(item, raw, f"{name}[{i}]") for i, raw in enumerate(value or ()))
    return _cast(hint, value, name)


def _is_required(field_: Field) -> bool:
    return field_.default is MISSING and field_.default_factory is MISSING


def _unknown_key(full: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {full!r}: did you mean {near[0]!r}? (valid here: {', '.join(known)})"


def _cast(hint: Any, value: Any, name: str) -> Any:
    """The value as the annotated type; text like 1e-5, which YAML reads as a string, is a float."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options or hint is None:
            return None
        raise ConfigError(f"{name} must not be null: give a {_type_name(hint)}")
    if bool in options and isinstance(value, bool):
        return value
    if isinstance(value, bool):
        raise ConfigError(f"{name} must be {_type_name(hint)}, got {value!r}")
    if int in options and isinstance(value, int):
        return value
    if float in options:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    if str in options and isinstance(value, str):
        return value
    raise ConfigError(f"{name} must be {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("NoneType", "null").replace("None", "null")
