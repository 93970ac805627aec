"""LoRA adapters (PEFT) in a model: added, initialised the same on any ranks, merged.

Their weights are drawn by name from a seed, so that every engine and every number of ranks begins
with the same values: B = 0, and A uniform in +-1 / sqrt(in_features), as PEFT draws it.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from safereg_dist.config import LoraConfig
from safereg_dist.errors import ConfigError

_NAME = "default"
"""PEFT's own name of the only adapter."""
_SAVED = f".modules_to_save.{_NAME}."
"""In the name of a parameter that is trained whole beside the adapters."""
ADAPTER_FILE = "adapter_model.safetensors"


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> nn.Module:
    """Puts adapters into `model`, in place, frees them for training and freezes everything else.

    Returns the PEFT model around it. The adapters' values are still to be set: `initial_value`.

    Raises:
        ConfigError: peft is not installed, or a target that the model does not have.
    """
    try:
        import peft
    except ImportError as err:
        raise ConfigError("lora needs peft: pip install 'safereg_dist[lora]'") from err
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",
        init_lora_weights=False,
        modules_to_save=list(config.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    _check_tied_head(model, config)
    keep_gradients(model)
    try:
        return peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as err:
        raise ConfigError(
            f"lora.targets={list(config.targets)} cannot be used on {type(model).__name__}: {err}"
        ) from err


def _check_tied_head(model: PreTrainedModel, config: LoraConfig) -> None:
    head, ends = model.get_output_embeddings(), tuple(f".{n}" for n in config.modules_to_save)
    whole = [name for name, m in model.named_modules() if m is head and f".{name}".endswith(ends)]
    if ends and whole and model.config.get_text_config().tie_word_embeddings:
        raise ConfigError(
            f"lora.modules_to_save names {whole[0]}, whose weight is the embedding's too: trained "
            "alone, a plain model could not hold both; leave it out, or untie the model first"
        )


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names (as PEFT saves them) and parameters of the adapters, and of what is trained whole."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name or _SAVED in name:
            yield name.replace(_SAVED, ".").replace(f".{_NAME}.", "."), parameter


class AdapterValues:
    """The first values of adapters: drawn from a seed, or those of a trained adapter's folder."""

    def __init__(self, config: LoraConfig, *, seed: int) -> None:
        """Raises ConfigError where `lora.path` holds no adapter."""
        self._config = config
        self._seed = seed
        self._stored: dict[str, Tensor] = {}
        if config.path is not None:
            self._stored = _read_adapter(Path(config.path))

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """float32 values of one adapter weight; None of one that begins as the model's own.

        Raises:
            ConfigError: `lora.path` lacks it, or holds another shape.
        """
        if self._config.path is not None:
            found = self._stored.get(f"base_model.model.{name}")
            if found is None or tuple(found.shape) != shape:
                has = "none" if found is None else tuple(found.shape)
                raise ConfigError(
                    f"lora.path={self._config.path}: expected {name} of shape {shape}, found "
                    f"{has}: set lora.rank and lora.targets as that adapter was trained"
                )
            return found.float()
        if ".lora_" not in name:
            return None
        if ".lora_B." in name:
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        bound = 1 / math.sqrt(shape[1])
        return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError) as err:
        raise ConfigError(
            f"lora.path={folder} holds no adapter that can be read ({err}): expected {ADAPTER_FILE}"
        ) from err


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


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """A block in which the model runs without its adapters."""
    layers = adapted_layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Merged(NamedTuple):
    """What a weight becomes where its adapter is merged: W + scaling B A."""

    parameters: list[nn.Parameter]
    """[W], or [W, A, B]."""
    scaling: float

    def of(self, whole: Sequence[Tensor]) -> Tensor:
        """The merged weight of whole parameters; in W's dtype, added in float32."""
        if len(whole) == 1:
            return whole[0]
        base, down, up = whole
        return (base.float() + self.scaling * (up.float() @ down.float())).to(base.dtype)


def merged_parameters(model: nn.Module) -> dict[str, Merged]:
    """Every weight of the model without adapters, by its name, with what is merged into it."""
    found = {name: Merged([p], 0.0) for name, p in base_parameters(model)}
    for name, module in model.named_modules():
        layer: Any = module
        if hasattr(layer, "lora_A") and _NAME in layer.lora_A:
            weight = found[f"{name}.weight"].parameters[0]
            pair = [layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]
            found[f"{name}.weight"] = Merged([weight, *pair], layer.scaling[_NAME])
    for name, parameter in model.named_parameters():
        if _SAVED in name:
            found[name.replace(_SAVED, ".")] = Merged([parameter], 0.0)
    return found


def base_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of a model; of one with adapters those that it had before."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        if "lora_" in name or ".modules_to_save." in name:
            continue
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter
