"""A trained adapter (PEFT, plain LoRA) in a folder: its settings and its weights, read whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from safereg_dist.config import LoraConfig
from safereg_dist.errors import ConfigError, reason_of

ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FREE = (
    "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern "
    "rank_pattern alpha_pattern use_rslora fan_in_fan_out init_lora_weights task_type peft_version "
    "inference_mode base_model_name_or_path revision auto_mapping"
).split()
"""Settings that an adapter may have its own of: all others change more than W + scaling B A."""
_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model's weights as they are."""


class StoredAdapter(NamedTuple):
    """A trained adapter that is put into a model and stays as it is."""

    name: str
    where: str
    """Its key and folder, for messages."""
    settings: Any
    """peft.LoraConfig, without dropout: a frozen adapter is used as it was trained to be."""
    tensors: dict[str, Tensor]
    """By the names that the model without PEFT's wrapper gives them."""

    def value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One weight in float32. Raises ConfigError as `value_of`."""
        return value_of(self.tensors, name, shape, self.where, "it was trained on another model")


def read_frozen(config: LoraConfig) -> list[StoredAdapter]:
    """The adapters of `lora.frozen`, in the order of their names.

    Raises:
        ConfigError: a folder holds no plain LoRA adapter that can be read, or one is named twice.
    """
    folders = {"lora.path": config.path} if config.path else {}
    folders |= {f"lora.frozen.{name}": folder for name, folder in config.frozen.items()}
    known: dict[Path, str] = {}
    for key, folder in folders.items():
        other = known.setdefault(Path(folder).resolve(), key)
        if other != key:
            raise ConfigError(
                f"{other} and {key} are both {folder}, which would count twice in the policy: name "
                "it once (a new adapter on a frozen one begins at zero, as if it went on from it)"
            )
    return [_read(name, Path(folder)) for name, folder in sorted(config.frozen.items())]


def _read(name: str, folder: Path) -> StoredAdapter:
    where = f"lora.frozen.{name}={folder}"
    settings = _read_settings(where, folder)
    tensors = read_tensors(where, folder)
    for key, tensor in tensors.items():
        if ".base_layer." in key:  # PEFT saves an adapted head's own weight, too
            continue
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ConfigError(
                f"{where}: {key} is no part of a plain LoRA adapter of linear layers: merge the "
                "adapter into the model with PEFT, and train on that"
            )
        if not tensor.isfinite().all():
            raise ConfigError(f"{where}: {key} is not finite: train or download it again")
    return StoredAdapter(name, where, settings, tensors)


def _read_settings(where: str, folder: Path) -> Any:
    import peft

    if not (folder / "adapter_config.json").is_file():  # PEFT would ask the hub
        raise ConfigError(
            f"{where} holds no adapter: expected adapter_config.json and {ADAPTER_FILE} in it, as "
            "PEFT saves them"
        )
    try:
        settings = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"{where}: adapter_config.json cannot be read ({reason_of(err)}): save it again"
        ) from err
    if not isinstance(settings, peft.LoraConfig):
        raise ConfigError(
            f"{where} is an adapter of type {getattr(settings.peft_type, 'value', None)}, expected "
            "LORA: merge it into the model with PEFT, and train on that"
        )
    plain, own = peft.LoraConfig().to_dict(), settings.to_dict()
    odd = [k for k in own if k not in _FREE and own[k] != plain.get(k) and (own[k] or plain.get(k))]
    odd += ["init_lora_weights"] * (settings.init_lora_weights not in _KEEPS_BASE)
    if odd:
        raise ConfigError(
            f"{where} is no plain LoRA adapter ({odd[0]}={json.dumps(own[odd[0]], default=str)}): "
            "merge it into the model with PEFT, and train on that"
        )
    settings.lora_dropout, settings.init_lora_weights = 0.0, False
    return settings


def read_tensors(where: str, folder: Path) -> dict[str, Tensor]:
    """The weights of an adapter's folder; `where` names it in messages.

    Raises:
        ConfigError: there are none that can be read.
    """
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            return {k.removeprefix(_PREFIX): file.get_tensor(k) for k in list(file.keys())}
    except (OSError, SafetensorError) as err:
        raise ConfigError(
            f"{where} holds no adapter that can be read ({err}): expected {ADAPTER_FILE}"
        ) from err


def value_of(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], where: str, remedy: str
) -> Tensor:
    """One weight in float32.

    Raises:
        ConfigError: there is none of that name and shape.
    """
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape:
        has = "none" if found is None else tuple(found.shape)
        raise ConfigError(f"{where}: expected {name} of shape {shape}, found {has}: {remedy}")
    return found.float()
