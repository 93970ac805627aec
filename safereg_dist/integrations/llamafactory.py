"""LLaMA-Factory with the step inside: its own YAML, and in it a section `safereg:`.

    python -m safereg_dist.integrations.llamafactory cfg.yaml [key=value ...]
    torchrun --nproc-per-node 8 -m safereg_dist.integrations.llamafactory cfg.yaml

LLaMA-Factory has no plugins. This takes the section out of the YAML, puts our trainer where its
supervised fine-tuning makes its own, and calls its `run_exp`. Its converters keep no column but
tokens and labels, so a row's risk is looked up by its texts.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safereg_dist.errors import ConfigError, SafeRegError, is_user_error
from safereg_dist.integrations.trainer import SafeRegMixin
from safereg_dist.integrations.yaml_section import read_section

_STACK = "LLaMA-Factory"
_OTHER_WORKFLOWS = ("use_mca", "use_hyper_parallel", "use_ray", "use_kt", "use_unsloth")
"""Keys that run another workflow, process or forward than the one that is regularised."""


def run(given: Mapping[str, Any]) -> None:
    """Runs a configuration of LLaMA-Factory whose `safereg` holds our settings.

    Raises:
        ConfigError: settings, or a kind of run that cannot work.
    """
    own = dict(given)
    section = own.pop("safereg", None)
    _check(own)
    settings = read_section(section, stack=_STACK, model=str(own.get("model_name_or_path") or "-"))
    is_packed = bool(own.get("neat_packing"))
    if is_packed and (settings.get("data") or {}).get("anchor") is not None:
        raise ConfigError(
            "anchor rows cannot be mixed with lines that LLaMA-Factory has packed: set "
            "neat_packing to false, or leave data.anchor out"
        )
    from llamafactory.train.tuner import run_exp  # type: ignore[import-not-found]

    with _trainer_swapped(settings, is_packed=is_packed) as made:
        run_exp(own)
    if not made:
        raise ConfigError(
            "LLaMA-Factory made no trainer of ours, so nothing was regularised: this version "
            "makes it elsewhere than in train/sft/workflow.py"
        )


def _check(own: Mapping[str, Any]) -> None:
    if own.get("stage", "sft") != "sft":
        raise ConfigError(
            f"stage={own['stage']} trains with another loss than supervised fine-tuning: set "
            "stage=sft, or run llamafactory-cli"
        )
    for key in _OTHER_WORKFLOWS:
        if own.get(key):
            raise ConfigError(f"{key} runs outside the trainer that is regularised: set it false")
    if own.get("packing") and not own.get("neat_packing"):
        raise ConfigError(
            "packing without neat_packing lets a row see the rows packed before it, and the "
            "reference would not: set neat_packing to true, or packing to false"
        )
    if own.get("neat_packing") and int(own.get("cutoff_len", 2048)) % 8:
        raise ConfigError(
            f"neat_packing pads tokens to a multiple of 8 but not their position ids, so cutoff_len"
            f"={own['cutoff_len']} would fail in the model: set a multiple of 8"
        )


@contextmanager
def _trainer_swapped(settings: dict[str, Any], *, is_packed: bool) -> Iterator[list[Any]]:
    """Yields the list of trainers that LLaMA-Factory makes meanwhile."""
    from llamafactory.train.sft import workflow  # type: ignore[import-not-found]

    plain = workflow.CustomSeq2SeqTrainer
    made: list[Any] = []

    class SafeRegSeq2SeqTrainer(SafeRegMixin, plain):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, safereg=settings, **kwargs)
            made.append(self)

        def _packs_rows(self) -> bool:
            return is_packed

    workflow.CustomSeq2SeqTrainer = SafeRegSeq2SeqTrainer
    try:
        yield made
    finally:
        workflow.CustomSeq2SeqTrainer = plain


def _read(path: str, changes: Sequence[str]) -> dict[str, Any]:
    """The YAML with `key=value` changes, as LLaMA-Factory reads it."""
    from omegaconf import OmegaConf  # type: ignore[import-not-found]
    from omegaconf.errors import OmegaConfBaseException  # type: ignore[import-not-found]
    from yaml import YAMLError

    try:
        merged = OmegaConf.merge(OmegaConf.load(Path(path)), OmegaConf.from_cli(list(changes)))
        found = OmegaConf.to_container(merged, resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as err:
        raise ConfigError(f"{path} cannot be read: {err}") from err
    if not isinstance(found, dict):
        raise ConfigError(f"expected a mapping in {path}, got {type(found).__name__}")
    return {str(key): value for key, value in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 on success, 2 if the user can fix the cause, 1 otherwise."""
    given = sys.argv[1:] if argv is None else list(argv)
    if not given or given[0].startswith("-"):
        print(__doc__)
        return 2
    try:
        run(_read(given[0], given[1:]))
    except SafeRegError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"safereg: {error}", file=sys.stderr, flush=True)
        return 2 if is_user_error(error) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
