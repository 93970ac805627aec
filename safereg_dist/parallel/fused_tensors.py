"""Which tensors of a checkpoint make up a parameter that transformers fuses on loading.

Checkpoints of mixtures of experts keep each expert's matrices apart; the model has one parameter
[experts, ...] of them. Flattened, it is those matrices one after another, so a rank can read its
own part of it.
"""

from collections.abc import Iterable

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
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


def _stacks_experts(converter: WeightConverter) -> bool:
    merge, *rest = [(type(each), getattr(each, "dim", None)) for each in converter.operations]
    return merge == (MergeModulelist, 0) and rest in ([], [(Concatenate, 1)])
