"""A reference with its own weights: a frozen model's trunk on an engine, and its head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from safereg_dist.errors import ConfigError
from safereg_dist.models.architecture import cache_name, decoder_layers
from safereg_dist.parallel.engine import Backend, ReferenceEngine
from safereg_dist.types import Head, head_of

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm")


class _KeepsNothing(DynamicCache):
    """A cache that is empty and stays so."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the given states; stores nothing."""
        return key_states, value_states


class ReferenceTrunk(nn.Module):
    """The trunk of the reference, whole or stopped after its first layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._stopped: dict[int, nn.Module] = {}
        self._without_routers = without_router_logits(model)
        self._cache_name = cache_name(model)

    def forward(self, input_ids: Tensor, num_layers: int | None = None) -> Tensor:
        """[B, S, H] last hidden states, or those after the first `num_layers` layers."""
        trunk = self.model.base_model if num_layers is None else self._stop_after(num_layers)
        # Without a cache transformers (5.17 to 5.24) looks at the position ids on the host, for
        # packed rows: the host would wait for the policy's forward before it launches this one.
        cache = {self._cache_name: _KeepsNothing()}
        output = trunk(input_ids=input_ids, use_cache=False, **cache, **self._without_routers)
        return output.last_hidden_state

    def _stop_after(self, num_layers: int) -> nn.Module:
        """A shallow copy of the trunk with fewer layers and no final norm.

        It shares every module with the trunk, so an engine's hooks still gather their weights. It
        is kept out of `modules()`: registered, its parameters would count twice.
        """
        if num_layers not in self._stopped:
            trunk = self.model.base_model
            name, layers = decoder_layers(self.model)
            if not 1 <= num_layers <= len(layers):
                raise ConfigError(
                    f"the probe reads layer {num_layers}, the reference has layers 1 to "
                    f"{len(layers)}: fit a probe for this model"
                )
            if num_layers == len(layers):
                return trunk
            # `copy.copy` would call the constructor of the class that FSDP2 gives its modules.
            stopped = object.__new__(type(trunk))
            vars(stopped).update(vars(trunk), _modules=dict(trunk._modules))
            stopped._modules[name] = nn.ModuleList(list(layers)[:num_layers])
            stopped._modules[_final_norm_name(trunk)] = nn.Identity()
            self._stopped[num_layers] = stopped
        return self._stopped[num_layers]


class EngineModel:
    """`ReferenceModel` with an engine and shards of its own.

    Its trunk is loaded on first use: never if all the states needed are stored.
    """

    def __init__(
        self, head: Head, load_trunk: Callable[[], ReferenceEngine], *, backend: Backend
    ) -> None:
        self.head = head
        self._load_trunk = load_trunk
        self._engine: ReferenceEngine | None = None
        self._backend = backend

    @classmethod
    def of_model(
        cls, model: PreTrainedModel, *, backend: Backend, offload: str, rows: int
    ) -> "EngineModel":
        """A reference from a loaded model; `rows` is the number of rows in one forward."""
        engine = backend.wrap_reference(ReferenceTrunk(model), offload=offload, rows=rows)
        return cls(head_of(model), lambda: engine, backend=backend)

    @property
    def engine(self) -> ReferenceEngine:
        """The trunk's engine. Collectives: on first use those of loading it."""
        if self._engine is None:
            self._engine = self._load_trunk()
        return self._engine

    @property
    def is_loaded(self) -> bool:
        """True once the trunk is loaded."""
        return self._engine is not None

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """[B, S, H_ref] last hidden states. Collectives: the engine's."""
        return self.engine(input_ids)

    def prefix_states(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after `num_layers` layers; runs no others. Collectives: the engine's."""
        return self.engine.prefix(input_ids, num_layers)

    @contextmanager
    def gathered_head(self) -> Iterator[Head]:
        """A block with the whole head. Collectives: one all-gather per parameter."""
        with self._backend.gathered(self.head.parameters) as whole:
            yield self.head.with_parameters(whole)


def without_router_logits(model: PreTrainedModel) -> dict[str, bool]:
    """What a forward is given so that a mixture of experts keeps no logits of its routers."""
    config = model.config.get_text_config()
    return {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}


def used_parameters(model: PreTrainedModel) -> int:
    """Weights that one token is multiplied by: no embeddings; of experts the routed ones."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0
    embedding = set(model.get_input_embeddings().parameters())
    return round(
        sum(
            # Under ZeRO-3 `ds_numel` is the size of the whole parameter.
            getattr(p, "ds_numel", p.numel()) * (share if ".experts." in name else 1.0)
            for name, p in model.base_model.named_parameters()
            if p not in embedding
        )
    )


def _final_norm_name(trunk: nn.Module) -> str:
    for name in _FINAL_NORMS:
        if name in trunk._modules:
            return name
    raise ConfigError(
        f"{type(trunk).__name__} has none of the final norms {', '.join(_FINAL_NORMS)}: the "
        "reference cannot stop early in this architecture; use risk.source=policy"
    )
