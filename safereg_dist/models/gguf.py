"""A chat model in a GGUF file, as a Hugging Face folder of plain weights."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from safereg_dist.errors import CheckpointError, ConfigError, reason_of
from safereg_dist.models.extras import require
from safereg_dist.storage.atomic import whole_folder

Precision = Literal["bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MAGIC = b"GGUF"


def convert_gguf(
    file: Path, out: Path, *, precision: Precision = "bf16", chat_template: str | None = None
) -> int:
    """Writes `out`, which `from_pretrained` loads and every verb takes; the number of weights.

    Quantised weights are written out in full. The tokenizer, its chat template and the end of a
    turn come from the file; `chat_template` replaces the template. All files go to a temporary
    folder that is renamed, so `out` is complete or absent.

    Raises:
        ConfigError: the file is missing, is no GGUF file, or holds an architecture or a
            quantisation that transformers does not read; the package `gguf` is missing.
        CheckpointError: `out` holds something already, or cannot be written.
    """
    _check(file)
    if out.exists():
        raise CheckpointError(f"{out} is there already: choose another folder, or remove it")
    model, tokenizer = _load(file)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise ConfigError(f"{file} has no chat template: give one with --chat-template")
    plain = _without_quantization(model).to(_DTYPES[precision])
    ends = {tokenizer.eos_token_id, model.config.eos_token_id} - {None}
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id
        if tokenizer.pad_token_id is None
        else tokenizer.pad_token_id,
    )
    with whole_folder(out) as partial:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return sum(parameter.numel() for parameter in plain.parameters())


def _check(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            begin = opened.read(len(_MAGIC))
    except OSError as err:
        raise ConfigError(
            f"cannot read {file}: {err.strerror or err}: give the path of a .gguf file"
        ) from err
    if begin != _MAGIC:
        raise ConfigError(f"{file} is no GGUF file: it begins with {begin!r}, expected {_MAGIC!r}")
    require("gguf")


def _load(file: Path) -> tuple[Any, Any]:
    """(model, tokenizer), float32."""
    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **where,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **where)
    except Exception as err:  # the readers raise what they meet: KeyError, IndexError, ValueError
        raise ConfigError(
            f"transformers cannot read {file}: {reason_of(err) or type(err).__name__}: give a "
            "whole file of an architecture and a quantisation that it knows"
        ) from err
    model, info = loaded
    if info["missing_keys"]:
        raise ConfigError(
            f"{file} lacks {len(info['missing_keys'])} weights, among them "
            f"{min(info['missing_keys'])}: give a whole file"
        )
    return model, tokenizer


def _without_quantization(model: Any) -> Any:
    """The same weights in a model that does not remember where they came from.

    transformers refuses to save a model that was loaded from a GGUF file.
    """
    facts = model.config.to_dict()
    facts.pop("quantization_config", None)
    plain = type(model)(type(model.config).from_dict(facts))
    plain.load_state_dict(model.state_dict())
    return plain
