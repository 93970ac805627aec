"""LoRA adapters (PEFT) in a model: added, initialised the same on any ranks, merged.

One is trained; frozen ones, trained before, may lie beside it and are on wherever it is. The values
of the trained one are drawn by name from a seed, so that every engine and every number of ranks
begins with the same: B = 0, and A uniform in +-1 / sqrt(in_features), as PEFT draws it.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safereg_dist.config import TRAINED_ADAPTER, LoraConfig
from safereg_dist.errors import ConfigError, reason_of
from safereg_dist.models.extras import needed
from safereg_dist.models.stored_adapter import StoredAdapter, read_tensors, value_of


def add_adapters(
    model: PreTrainedModel, config: LoraConfig | None, frozen: Sequence[StoredAdapter] = ()
) -> None:
    """Puts adapters into `model`, in place: the one to train (None: no such), then frozen ones.

    All are on; only the trained one, and what is trained whole beside it, gets gradients. Their
    values are still to be set: `AdapterValues`.

    Raises:
        ConfigError: peft is not installed, a target that the model does not have, or a frozen
            adapter of another model.
    """
    with needed():
        import peft
    added = [(each.name, each.settings, each.where) for each in frozen]
    if config is not None:
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=list(config.targets) or "all-linear",
            init_lora_weights=False,
            modules_to_save=list(config.modules_to_save) or None,
            task_type="CAUSAL_LM",
        )
        added.insert(0, (TRAINED_ADAPTER, settings, f"lora.targets={list(config.targets)}"))
        _check_tied_head(model, config)
    _check_frozen_heads(model, frozen)
    keep_gradients(model)
    wrapped: Any = None
    for name, settings, where in added:
        try:
            if wrapped is None:
                wrapped = peft.get_peft_model(
                    model, settings, adapter_name=name, autocast_adapter_dtype=False
                )
            else:
                wrapped.add_adapter(name, settings, autocast_adapter_dtype=False)
        except (ValueError, KeyError) as err:
            raise ConfigError(
                f"{where} cannot be used on {type(model).__name__}: {reason_of(err)}"
            ) from err
    if frozen:
        _freeze(model, frozen)


def _freeze(model: PreTrainedModel, frozen: Sequence[StoredAdapter]) -> None:
    """Switches all adapters on, the trained one last, and leaves gradients to that one."""
    names = [each.name for each in frozen]
    known: Any = model.peft_config
    switch_on(model, names + [TRAINED_ADAPTER] * (TRAINED_ADAPTER in known))
    for each in frozen:
        own = dict(adapter_parameters(model, each.name))
        for parameter in own.values():
            parameter.requires_grad_(False)
        if odd := sorted(own.keys() ^ each.tensors.keys()):
            who = "the model" if odd[0] in each.tensors else "its folder"
            raise ConfigError(
                f"{each.where} and {type(model).__name__} do not fit, {who} has no {odd[0]}: it "
                "was trained on another model"
            )


def _check_frozen_heads(model: PreTrainedModel, frozen: Sequence[StoredAdapter]) -> None:
    head = model.get_output_embeddings()
    names = [f"{name}.lora_A.weight" for name, m in model.named_modules() if m is head]
    for each in frozen:
        if any(name in each.tensors for name in names):
            raise ConfigError(
                f"{each.where} has weights for the head, which must be a plain nn.Linear: merge "
                "the adapter into the model with PEFT, and train on that"
            )


def _check_tied_head(model: PreTrainedModel, config: LoraConfig) -> None:
    head, ends = model.get_output_embeddings(), tuple(f".{n}" for n in config.modules_to_save)
    whole = [name for name, m in model.named_modules() if m is head and f".{name}".endswith(ends)]
    if ends and whole and model.config.get_text_config().tie_word_embeddings:
        raise ConfigError(
            f"lora.modules_to_save names {whole[0]}, whose weight is the embedding's too: trained "
            "alone, a plain model could not hold both; leave it out, or untie the model first"
        )


def adapter_parameters(
    model: nn.Module, adapter: str = TRAINED_ADAPTER
) -> Iterator[tuple[str, nn.Parameter]]:
    """Names (as PEFT saves them) and parameters of one adapter, and of what is trained with it."""
    lora = re.compile(rf"\.(lora_\w+)\.{re.escape(adapter)}(?=\.|$)")
    saved = f".modules_to_save.{adapter}."
    for name, parameter in model.named_parameters():
        if saved in name:
            yield name.replace(saved, "."), parameter
        elif lora.search(name):
            yield lora.sub(r".\1", name), parameter


def weights_with(
    model: nn.Module, adapters: Sequence[str] = ()
) -> Iterator[tuple[str, nn.Parameter]]:
    """The base model's parameters and those of some adapters, by names for a fingerprint.

    What an adapter is called is not in them; by what it is multiplied is.
    """
    yield from base_parameters(model)
    for adapter in sorted(adapters):
        scalings: dict[str, float] = {}
        for name, module in model.named_modules():
            layer: Any = module
            if hasattr(layer, "lora_A") and adapter in layer.scaling:
                scalings[name] = layer.scaling[adapter]
        for name, parameter in adapter_parameters(model, adapter):
            yield f"{name} * {scalings.get(name.rpartition('.lora_')[0], 1.0)}", parameter


class AdapterValues:
    """The first values of adapters: drawn from a seed, or those of a trained adapter's folder."""

    def __init__(
        self, config: LoraConfig | None, *, seed: int, frozen: Sequence[StoredAdapter] = ()
    ) -> None:
        """Raises ConfigError where `lora.path` holds no adapter."""
        self._config = config
        self._seed = seed
        self._frozen = {each.name: each for each in frozen}
        self._stored: dict[str, Tensor] = {}
        if config is not None and config.path is not None:
            self._stored = read_tensors(f"lora.path={config.path}", Path(config.path))

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters whose values these are."""
        return [TRAINED_ADAPTER] * (self._config is not None) + list(self._frozen)

    def __call__(
        self, name: str, shape: tuple[int, ...], adapter: str = TRAINED_ADAPTER
    ) -> Tensor | None:
        """float32 values of one adapter weight; None of one that begins as the model's own.

        Raises:
            ConfigError: the adapter's folder lacks it, or holds another shape.
        """
        if adapter in self._frozen:
            return self._frozen[adapter].value(name, shape)
        assert self._config is not None
        if self._config.path is not None:
            remedy = "set lora.rank and lora.targets as that adapter was trained"
            return value_of(self._stored, name, shape, f"lora.path={self._config.path}", remedy)
        if ".lora_" not in name:
            return None
        if ".lora_B." in name:
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        bound = 1 / math.sqrt(shape[1])
        return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


def keep_gradients(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on a CPU, which it does in eval mode.

    It does so in place, at the first forward without gradients where the CPU has AVX512-BF16;
    products with repacked weights give no gradient (bitsandbytes 0.50).

    Raises:
        ConfigError: it has repacked them already.
    """
    for name, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        layer.support_avx512bf16_for_cpu = False
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigError(
                f"bitsandbytes has repacked {name} for inference, since the model ran in eval mode "
                "on the CPU: it would get no gradient; load the model again, and evaluate it after "
                "safety is prepared"
            )


def adapted_layers(model: nn.Module) -> list[Any]:
    """PEFT's modules around the layers that have adapters, or are trained whole beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


def switch_on(model: nn.Module, adapters: Sequence[str]) -> None:
    """Lets these adapters act in a forward, and no others. PEFT frees them for training, too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in adapted_layers(model):
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(adapters))
        else:  # trained whole: one adapter's copy, or the original
            layer.set_adapter(layer.check_set_adapter(list(adapters)) or [])


@contextmanager
def only_adapter(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """A block in which the model runs with this adapter alone; None = without any."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = adapted_layers(model)
    if adapter is not None:
        before = next(x.active_adapters for x in layers if isinstance(x, BaseTunerLayer))
        switch_on(model, [adapter])
        try:
            yield
        finally:
            switch_on(model, before)
        return
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Merged(NamedTuple):
    """What a weight becomes where adapters are merged: W + sum of scaling B A."""

    parameters: list[nn.Parameter]
    """[W, A, B, A, B, ...]: a pair of each adapter."""
    scalings: list[float]
    """Of each adapter."""

    def of(self, whole: Sequence[Tensor]) -> Tensor:
        """The merged weight of whole parameters; in W's dtype, added in float32."""
        base, *pairs = whole
        if not pairs:
            return base
        merged = base.float()
        for scaling, down, up in zip(self.scalings, pairs[::2], pairs[1::2], strict=True):
            merged = merged + scaling * (up.float() @ down.float())
        return merged.to(base.dtype)


def merged_parameters(model: nn.Module) -> dict[str, Merged]:
    """Every weight of the model without adapters, by its name, with what is merged into it."""
    found = {name: Merged([p], []) for name, p in base_parameters(model)}
    for name, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "lora_A"):
            continue
        weight = found[f"{name}.weight"]
        for adapter in (each for each in layer.active_adapters if each in layer.lora_A):
            weight.parameters.extend([layer.lora_A[adapter].weight, layer.lora_B[adapter].weight])
            weight.scalings.append(layer.scaling[adapter])
    saved = f".modules_to_save.{TRAINED_ADAPTER}."
    for name, parameter in model.named_parameters():
        if saved in name:
            found[name.replace(saved, ".")] = Merged([parameter], [])
    return found


def base_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of a model; of one with adapters those that it had before."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        if "lora_" in name or ".modules_to_save." in name:
            continue
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter
