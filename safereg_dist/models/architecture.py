"""What a Hugging Face folder says its model is, built without running anything from the folder.

Code beside the weights is never imported (`trust_remote_code=False`, said at every call, since
transformers would ask on a terminal), and weights are read from safetensors alone: a pickle runs
code as it is loaded. `config.json` is a description that anyone may have written.
"""

from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from safereg_dist.errors import ConfigError, reason_of

MOST_LAYERS = 1_000
MOST_EXPERTS = 4_096
"""Of modules that are built one by one: a number beyond them would keep a process busy for ever."""


def read_architecture(folder: Path) -> PreTrainedConfig:
    """The `config.json` of a Hugging Face folder.

    Raises:
        ConfigError: there is none, transformers does not know its architecture, it has layers or
            experts without end, or the weights are quantised.
    """
    try:
        found = read_settings(folder)
    except Exception as err:  # its classes check their fields with errors of all kinds
        raise ConfigError(
            f"expected the config.json of a causal language model in {folder}, got: "
            f"{reason_of(err, 200) or type(err).__name__}: check the path"
        ) from err
    if getattr(found, "quantization_config", None) is not None:
        kind = as_mapping(found.quantization_config).get("quant_method", "unnamed")
        raise ConfigError(
            f"the weights in {folder} are quantised (quantization_config: {kind}), expected plain "
            "ones: give the folder they were made from; engine.quantize packs the frozen weights"
        )
    return found


def read_settings(model: Path | str, **how: Any) -> PreTrainedConfig:
    """The configuration of a folder or an id, quantised ones too; `how` as in `from_pretrained`.

    Raises:
        Exception: what transformers raises; ValueError where it has layers or experts without end.
    """
    parts = Path(model).parts
    # An id of a hub has two parts at most, and its first is an owner, no folder of this machine.
    is_path = len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())
    if is_path and not Path(model).exists():
        raise FileNotFoundError(f"there is no folder {model}")
    found = AutoConfig.from_pretrained(model, trust_remote_code=False, **how)
    require_countable(found)
    return found


def require_countable(config: Any) -> None:
    """Raises ValueError where a configuration asks for more modules than any model has."""
    inner = config.get_text_config()
    for most, *names in (
        (MOST_LAYERS, "num_hidden_layers", "encoder_layers", "decoder_layers"),
        (MOST_EXPERTS, "num_local_experts", "num_experts", "n_routed_experts"),
    ):
        for name in names:
            value = getattr(inner, name, None)
            if value is not None and (not isinstance(value, int) or value > most):
                raise ValueError(f"{name} must be a whole number up to {most}, got {value!r}")


def as_mapping(given: Any) -> dict[str, Any]:
    """A configuration's part as a dict, whichever of the two transformers made of it."""
    return given if isinstance(given, dict) else getattr(given, "to_dict", dict)()


def build_model(architecture: PreTrainedConfig, **how: Any) -> Any:
    """A causal language model with random weights; `how` as in `from_config`.

    Raises:
        ConfigError: its sizes or names do not go together.
    """
    try:
        return AutoModelForCausalLM.from_config(architecture, trust_remote_code=False, **how)
    except Exception as err:  # anything that a constructor may say about sizes
        raise ConfigError(
            f"transformers cannot build this {architecture.model_type} "
            f"({reason_of(err, 200) or type(err).__name__}): check the sizes in its config.json"
        ) from err


def require_safetensors(folder: Path) -> None:
    """Raises ConfigError where a folder has weights as pickles alone."""
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"expected weights in safetensors in {folder}, found {pickles[0]}, a pickle, which can "
            "run code as it is loaded: load it where you trust it and call "
            "save_pretrained(FOLDER), which writes safetensors"
        )


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name in the base model, and list, of the decoder layers of a causal language model.

    Raises:
        ConfigError: the base model has no list of `num_hidden_layers` modules.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.base_model.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ConfigError(
        f"{type(model).__name__} has no list of {count} decoder layers in its base model: this "
        "architecture is not supported"
    )


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recomputes decoder layers in the backward pass instead of keeping their activations."""
    # Renamed in transformers 5.23; the old name goes once the lower bound has passed it.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def cache_name(model: PreTrainedModel) -> str:
    """The name of a cache that a forward takes and returns, which transformers 5.24 changed."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
