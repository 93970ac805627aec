"""The `safereg:` section of a stack's own YAML: read and checked before a model is loaded."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safereg_dist.config import Config
from safereg_dist.errors import ConfigError
from safereg_dist.factory.prepare import config_of, read_settings


def read_section(given: Any, *, stack: str, model: str) -> dict[str, Any]:
    """The settings for `prepare` from the section, a mapping or the path of a YAML file.

    Args:
        stack: its name, for messages.
        model: what the stack trains, by default the reference as well.
    Raises:
        ConfigError: no such section, an unknown key, or a file that is not there.
    """
    if given is None:
        raise ConfigError(
            f"{stack}: the YAML has no `safereg:` section: add one with `risk` and `reference`, or "
            "train without safereg"
        )
    if not isinstance(given, str | Mapping):
        raise ConfigError(
            f"{stack}: expected a mapping or the path of a YAML file under `safereg`, got "
            f"{type(given).__name__}"
        )
    try:
        # Plain values: stacks have mappings of their own.
        section: dict[str, Any] = json.loads(json.dumps(read_settings(given), default=str))
        config = config_of(section, model)
    except ConfigError as err:
        raise ConfigError(f"{stack}, section `safereg`: {err}") from err
    for where, estimator, path in _signals(config):
        _check_signal(where, estimator, path, stack)
    if config.data.anchor is not None and not Path(config.data.anchor).is_file():
        raise ConfigError(
            f"expected anchor rows at data.anchor={config.data.anchor}, found no such file: write "
            "it with `safereg anchor build`"
        )
    return section


def _signals(config: Config) -> Iterator[tuple[str, str, str | None]]:
    risk = config.risk
    if risk.estimator in ("max", "weighted"):
        for index, part in enumerate(risk.parts):
            yield f"risk.parts[{index}]", part.estimator, part.path
    else:
        yield "risk", risk.estimator, risk.path


def _check_signal(where: str, estimator: str, path: str | None, stack: str) -> None:
    if estimator == "column":
        raise ConfigError(
            f"{stack} keeps no column but tokens and labels, so {where}.estimator=column finds "
            f"nothing: set {where}.estimator=lookup and {where}.path to the scored rows"
        )
    if estimator == "lookup" and not Path(path or "").is_file():
        raise ConfigError(
            f"expected a file of scored rows at {where}.path={path}, found none: write it with "
            "`safereg score` (a relative path begins at the folder of a YAML of its own, in the "
            "stack's YAML at the working folder)"
        )
