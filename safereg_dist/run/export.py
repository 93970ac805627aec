"""The trained policy as a plain Hugging Face folder, written layer by layer."""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.config import TRAINED_ADAPTER
from safereg_dist.errors import CheckpointError
from safereg_dist.models.adapters import (
    adapter_parameters,
    base_parameters,
    merged_parameters,
)
from safereg_dist.models.stored_adapter import ADAPTER_FILE
from safereg_dist.parallel.engine import Backend
from safereg_dist.parallel.fused_tensors import as_stored
from safereg_dist.parallel.shards import INDEX_FILE, SINGLE_FILE


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    backend: Backend,
    shard_bytes: int,
) -> None:
    """Writes config, tokenizer and safetensors shards so that `from_pretrained` loads them.

    A rank holds at most one layer beyond its own shards, the main rank also the tensors of one
    file. All files go to a temporary folder that is renamed, so `folder` is complete or absent.

    Raises:
        CheckpointError: the disk is too small; nothing is left behind.
    Collectives: one all-gather per parameter, one gather of texts.
    """
    ranks = backend.ranks
    partial = folder.with_name(f".{folder.name}.partial")
    plan = _plan_shards(model, shard_bytes)
    with ranks.together():
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    error: Exception | None = None
    held: dict[str, Tensor] = {}
    written: dict[str, str] = {}
    for name, tensor, last_of in _gathered_tensors(model, plan, backend):
        if not ranks.is_main or error is not None:
            continue  # the main rank's error is raised after the collectives, by all ranks
        held[name] = tensor
        if last_of is not None:
            try:
                stored = as_stored(model, held)
                save_file(stored, partial / last_of, metadata={"format": "pt"})
                written |= dict.fromkeys(stored, last_of)
            except Exception as err:
                error = err
            held = {}
    with ranks.together():
        try:
            if error is not None:
                raise error
            if ranks.is_main:
                _finish(model, tokenizer, written, partial, folder)
        except (OSError, SafetensorError) as err:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"expected to write the model to {folder}, got: {err}: free disk space and run the "
                "same command again"
            ) from err


Plan = list[tuple[str, list[str]]]
"""(file, parameter names) of every shard, in order."""


def _plan_shards(model: PreTrainedModel, shard_bytes: int) -> Plan:
    groups: list[list[str]] = [[]]
    size = 0
    for name, parameter in base_parameters(model):
        numel = getattr(parameter, "ds_numel", parameter.numel())
        nbytes = numel * parameter.element_size()
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return [(SINGLE_FILE, groups[0])]
    count = len(groups)
    return [(f"model-{i:05d}-of-{count:05d}.safetensors", g) for i, g in enumerate(groups, 1)]


def _gathered_tensors(
    model: PreTrainedModel, plan: Plan, backend: Backend
) -> Iterator[tuple[str, Tensor, str | None]]:
    """Yields (name, host copy, file that this tensor completes) for every parameter, in order.

    The copy is made on the main rank only; others get an empty tensor.
    """
    merged = merged_parameters(model)
    for file, names in plan:
        for group in _by_module(names):
            parts = [merged[name] for name in group]
            with backend.gathered([p for part in parts for p in part.parameters]) as gathered:
                whole = iter(gathered)
                for name, part in zip(group, parts, strict=True):
                    own = list(islice(whole, len(part.parameters)))
                    copy = _host_copy(part.of(own)) if backend.ranks.is_main else torch.empty(0)
                    yield name, copy, file if name == names[-1] else None


def _by_module(names: list[str]) -> Iterator[list[str]]:
    """Groups consecutive names by decoder layer (or other module of the same depth)."""
    run: list[str] = []
    for name in names:
        if run and _layer_of(run[-1]) != _layer_of(name):
            yield run
            run = []
        run.append(name)
    if run:
        yield run


def _layer_of(name: str) -> str:
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if numbered is None else ".".join(parts[: numbered + 1])


def export_adapters(model: PreTrainedModel, folder: Path, *, backend: Backend) -> None:
    """Writes the trained adapter alone, as PEFT loads it; `folder` is complete or absent.

    Raises:
        CheckpointError: it cannot be written.
    Collectives: one all-gather per adapter weight, one gather of texts.
    """
    named = list(adapter_parameters(model))
    with backend.gathered([parameter for _, parameter in named]) as whole:
        held = {
            f"base_model.model.{name}": _host_copy(tensor)
            for (name, _), tensor in zip(named, whole, strict=True)
        }
    with backend.ranks.together():
        if not backend.ranks.is_main:
            return
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(held, partial / ADAPTER_FILE, metadata={"format": "pt"})
            config: Any = model.peft_config[TRAINED_ADAPTER]  # type: ignore[index]
            config.base_model_name_or_path = model.name_or_path or None
            config.save_pretrained(str(partial))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except (OSError, SafetensorError) as err:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"expected to write the adapters to {folder}, got: {err}: free disk space and run "
                "the same command again"
            ) from err


def _host_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True).contiguous()


def _finish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weight_map: dict[str, str],
    partial: Path,
    folder: Path,
) -> None:
    files = set(weight_map.values())
    if len(files) > 1:
        total = sum((partial / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(partial)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
