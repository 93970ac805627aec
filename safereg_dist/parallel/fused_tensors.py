"""Which tensors of a checkpoint make up a parameter that transformers fuses on loading, and back.

Checkpoints of mixtures of experts keep each expert's matrices apart; the model has one parameter
[experts, ...] of them. Flattened, it is those matrices one after another, so a rank can read its
own part of it.
"""

import re
from collections.abc import Iterable

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


def fused_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors whose flattened values follow one another in each parameter, by converted name.

    Of experts: stacked along dim 0, gate and up of one expert along dim 1. A tensor that is only
    renamed stands alone. Parameters that need any other conversion are left out.
    """
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    collected: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        collected.setdefault(target, {}).setdefault(pattern, []).append(name)
    found = {}
    for target, tensors in collected.items():
        if None in tensors:
            found[target] = tensors[None]
            continue
        pattern = next(iter(tensors))
        converter = next(each for each in converters if pattern in each.source_patterns)
        if _stacks_experts(converter):
            alike = [tensors.get(pattern, []) for pattern in converter.source_patterns]
            found[target] = [name for expert in zip(*alike, strict=False) for name in expert]
    return found


def as_stored(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole parameters by name, under the names that checkpoints of the model have them.

    Fused experts come apart, in memory of their own; those of other models are given back.
    """
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    fused = [
        re.compile(pattern)
        for each in transforms
        if isinstance(each, WeightConverter) and _stacks_experts(each)
        for pattern in each.target_patterns
    ]
    if not any(each.search(name) for each in fused for name, _ in model.named_parameters()):
        return tensors
    stored = revert_weight_conversion(model, tensors)  # type: ignore[arg-type]
    return {name: tensor.clone() for name, tensor in stored.items()}


def _stacks_experts(converter: WeightConverter) -> bool:
    merge, *rest = [(type(each), getattr(each, "dim", None)) for each in converter.operations]
    return merge == (MergeModulelist, 0) and rest in ([], [(Concatenate, 1)])
