"""The sizes of a model, from its `config.json` or name: no download, and no weight is made.

The parameters are those of the model that transformers builds on the meta device, so tied
embeddings, biases and experts are counted as they are trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safereg_dist.errors import ConfigError, reason_of
from safereg_dist.plan.named_shapes import NAMED_SHAPES, shape_name
from safereg_dist.storage.json_text import parse_json

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "moe_intermediate_size",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
)
"""Fields without which a model cannot be counted, as far as its architecture has them."""
COUNTED = "llama, mistral, qwen2, qwen3, phi3, gemma2, falcon, mixtral, qwen3_moe"
"""Types whose counts are tested; others that transformers knows are read the same way."""

SUMMED_OUTPUTS = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2")
"""Products whose inputs tensor parallelism divides: their outputs are sums over its ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module at which ZeRO-3 gathers, releases or prefetches parameters."""

    layer: int | None
    """Index of its decoder layer; None outside."""
    part: str
    """`embedding`, `layers`, `final` or `head`."""
    numels: tuple[int, ...]
    """Elements of each parameter of its own."""
    used: float
    """Elements that one token goes through: of experts, those chosen."""
    products: float
    """Of these, the elements of matrices."""
    split: int
    """Elements that tensor parallelism divides; the others are whole on each of its ranks."""
    path: str = ""
    """Its name in the model."""
    linear: tuple[int, int] | None = None
    """Both sizes of a linear layer that may get an adapter: not of the head."""

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return sum(self.numels)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a causal language model that costs depend on."""

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    attention_width: int
    """Query heads times their size."""
    key_value_width: int
    """Key heads times their size."""
    mlp_width: int
    """Width of the MLP that one token goes through: of experts, all chosen ones together."""
    num_chosen: int
    """Experts that one token goes through; 1 without experts."""
    num_heads: int
    keeps_scores: bool
    """True where attention needs its scores as a matrix (soft-capped): no fused attention."""
    is_tied: bool
    """True if the head's weight is the embedding."""
    modules: tuple[Module, ...]
    """In the order of the forward pass; a tied head is not among them."""

    @cached_property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(module.numel for module in self.modules)

    def part(self, name: str) -> int:
        """Parameters of `embedding`, `layers`, `final` or `head`."""
        return sum(module.numel for module in self.modules if module.part == name)

    @cached_property
    def head_parameters(self) -> int:
        """Elements of the head's weight, tied or not."""
        return self.hidden_size * self.vocab_size

    @cached_property
    def trunk(self) -> tuple[Module, ...]:
        """Parameters of the trunk, which the reference runs: all but an untied head."""
        return tuple(module for module in self.modules if module.part != "head")

    @cached_property
    def layer_products(self) -> float:
        """Elements of all layers that one token is multiplied with."""
        return sum(module.products for module in self.modules if module.part == "layers")

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token goes through: experts that are not chosen left out."""
        return round(sum(module.used for module in self.modules))


def read_shape(model: str | Path) -> ModelShape:
    """The shape of a `config.json`, of a folder with one, or of a name in `NAMED_SHAPES`.

    Raises:
        ConfigError: see `read_fields` and `shape_of`.
    """
    return shape_of(read_fields(model), where=str(model))


def read_fields(model: str | Path) -> dict[str, Any]:
    """The fields of that `config.json`; loads no torch.

    Raises:
        ConfigError: not readable, not JSON, or neither a file nor a known name.
    """
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    name = shape_name(str(model))
    if name is not None and not path.exists():
        return NAMED_SHAPES[name]
    try:
        found = parse_json(path.read_bytes())
    except OSError as err:
        raise ConfigError(
            f"--model-config {path} cannot be read: {err.strerror}; a name is one of "
            f"{', '.join(NAMED_SHAPES)}"
        ) from err
    except ValueError as err:
        raise ConfigError(f"--model-config {path} is not JSON ({err})") from err
    if not isinstance(found, dict):
        raise ConfigError(f"--model-config {path} must hold an object, got {type(found).__name__}")
    return found


def shape_of(fields: Mapping[str, Any], *, where: str) -> ModelShape:
    """The shape that the fields of a `config.json` describe; `where` is for errors.

    Raises:
        ConfigError: unknown type, missing field, or sizes that do not go together.
    """
    import torch

    from safereg_dist.models.architecture import build_model

    config = _checked_config(fields, where)
    try:
        with torch.device("meta"):
            model = build_model(config, dtype=torch.bfloat16)
    except ConfigError as err:
        raise ConfigError(f"{where}: {err}") from err
    return _shape(model, config.get_text_config())


def _checked_config(fields: Mapping[str, Any], where: str) -> Any:
    """The transformers config; sizes that the file leaves out are refused, never guessed."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from safereg_dist.models.architecture import require_countable

    model_type = str(fields.get("model_type"))
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"{where}: model_type must be that of a causal language model of transformers "
            f"({COUNTED}, ...), got {model_type!r}"
        )
    config_class = CONFIG_MAPPING[model_type]
    own_names = dict(config_class.attribute_map)
    if "text_config" not in fields:
        _require_sizes(fields, config_class, own_names, where)
    try:
        found = config_class(**{k: v for k, v in fields.items() if k != "model_type"})
        require_countable(found)
        return found
    except Exception as err:
        raise ConfigError(
            f"{where}: not a valid configuration of {model_type} ({reason_of(err, 200)})"
        ) from err


def _require_sizes(
    fields: Mapping[str, Any], config_class: Any, own_names: dict[str, str], where: str
) -> None:
    # A default that is a number would stand in for what the file does not say; None is worked out.
    needed = [n for n in SIZES if isinstance(getattr(config_class, own_names.get(n, n), 0.0), int)]
    missing = [n for n in needed if n not in fields and own_names.get(n, n) not in fields]
    if missing:
        known = [n for n in needed if n not in missing]
        raise ConfigError(
            f"{where}: a {fields['model_type']} needs {', '.join(needed)}; missing: "
            f"{', '.join(missing)}; found: {', '.join(known) or 'none'}: use the config.json that "
            "comes with the model"
        )


def _shape(model: Any, config: Any) -> ModelShape:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise ConfigError(
            f"a {config.model_type} has no attention heads: a plan is made for decoders of "
            f"attention layers alone ({', '.join(SIZES)})"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts") or 1
    width = _first(config, "ffn_hidden_size", "intermediate_size", "n_inner")
    if experts > 1:
        width = _first(config, "moe_intermediate_size", "intermediate_size")
    width = width or 4 * config.hidden_size
    return ModelShape(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        attention_width=heads * head_dim,
        key_value_width=_key_heads(config) * head_dim,
        mlp_width=width * (chosen if experts > 1 else 1),
        num_chosen=chosen if experts > 1 else 1,
        num_heads=heads,
        keeps_scores=getattr(config, "attn_logit_softcapping", None) is not None,
        is_tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        modules=_modules(model, chosen / experts),
    )


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _key_heads(config: Any) -> int:
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else config.num_attention_heads
    return _first(config, "num_key_value_heads", "num_kv_heads") or config.num_attention_heads


def _modules(model: Any, chosen_share: float) -> tuple[Module, ...]:
    from safereg_dist.models.architecture import decoder_layers

    _, layers = decoder_layers(model)
    layer_of = {id(m): i for i, layer in enumerate(layers) for m in layer.modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    seen: set[int] = set()
    found = []
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        if type(module).__name__ == "ModuleList":
            continue  # never called
        layer = layer_of.get(id(module))
        share = chosen_share if ".experts" in path else 1.0
        found.append(
            Module(
                layer=layer,
                part=_part(module, layer, embedding, head),
                numels=tuple(p.numel() for p in own),
                used=share * sum(p.numel() for p in own),
                products=share * sum(p.numel() for p in own if p.dim() > 1),
                split=_split(path, own),
                path=path,
                linear=_linear(module, head),
            )
        )
    return tuple(found)


def _split(path: str, own: list[Any]) -> int:
    """Matrices, and the biases of those whose outputs are divided."""
    matrices = sum(p.numel() for p in own if p.dim() > 1)
    if not matrices or path.rsplit(".", 1)[-1] in SUMMED_OUTPUTS:
        return matrices
    return sum(p.numel() for p in own)


def _linear(module: Any, head: Any) -> tuple[int, int] | None:
    """Both sizes of what PEFT's `all-linear` gives an adapter."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if module is head or not isinstance(module, torch.nn.Linear | Conv1D):
        return None
    first, second = module.weight.shape
    return (first, second)  # the other way round in one of them; an adapter's size is the same


def _part(module: Any, layer: int | None, embedding: Any, head: Any) -> str:
    if layer is not None:
        return "layers"
    if module is head:
        return "head"
    return "embedding" if module is embedding else "final"
