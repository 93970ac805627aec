"""The policy itself as its reference, with its adapters off: no second copy of the weights.

The pass runs the policy's own engine, so it comes before the policy's forward and never inside it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from safereg_dist.errors import ConfigError
from safereg_dist.models.adapters import adapted_layers, keep_gradients, only_adapter
from safereg_dist.models.architecture import decoder_layers
from safereg_dist.policy import Policy
from safereg_dist.reference.trunk import without_router_logits
from safereg_dist.types import Head


class AdaptersOff:
    """`reference.base.ReferenceModel` over a PEFT model; its head is the policy's own."""

    runs_policy = True

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        adapter: str | None = None,
        gathered: Callable[[Any], AbstractContextManager[Sequence[nn.Parameter]]],
    ) -> None:
        """`adapter` names a trained adapter that stays on in the reference; None = all are off.

        `gathered(parameters)` is a block with whole ones: `Backend.gathered`.

        Raises:
            ConfigError: the model has no adapters, or none of that name; see `keep_gradients`.
        """
        known = list(getattr(model, "peft_config", {}))
        if not known:
            raise ConfigError(
                "reference.engine=adapters_off takes the model without its adapters as the "
                "reference, but the model has none: wrap it with peft.get_peft_model first, or "
                "choose another reference.engine"
            )
        if adapter is not None and adapter not in known:
            raise ConfigError(
                f"reference.adapter={adapter!r}: the model has the adapters {', '.join(known)}"
            )
        keep_gradients(model)
        self._model: Any = model
        self._policy = policy
        self._adapter = adapter
        self._gathered = gathered
        self._without_routers = without_router_logits(policy.model)
        self._forward: Callable[..., Any] = model
        self._own_trace: Callable[[], AbstractContextManager[None]] = nullcontext

    def bind(self, engine: Callable[..., Any]) -> None:
        """Runs the pass through the engine that wraps the model, along a trace of its own."""
        self._forward = engine
        if hasattr(getattr(engine, "optimizer", None), "parameter_offload"):  # ZeRO-3
            from safereg_dist.parallel.deepspeed import SeparateTrace, gathered

            offload = engine.optimizer.parameter_offload  # type: ignore[attr-defined]
            # With adapters on, ZeRO-3 learns that these layers read their adapters' weights.
            self._own_trace = SeparateTrace(offload, forgetful=adapted_layers(self._model))
            self._gathered = gathered  # `prepare` may have seen the model whole

    @property
    def head(self) -> Head:
        """The head before training: that of the policy, or its original if it is trained whole."""
        own: Any = self._policy.model.get_output_embeddings()
        if hasattr(own, "original_module"):  # trained whole: PEFT keeps a copy for each adapter
            copies = own.modules_to_save
            own = copies[self._adapter] if self._adapter in copies else own.original_module
        # Not its attributes: ZeRO-3 would gather them, and take them for the policy's from then on.
        weight, bias = [*own.parameters(recurse=False), None][:2]
        return self._policy.head._replace(weight=weight, bias=bias)

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """[B, S, H] last hidden states. Collectives: the engine's.

        Raises:
            ConfigError: ZeRO-3 has sharded the model, and its engine was not bound.
        """
        if self._forward is self._model and hasattr(next(self._model.parameters()), "ds_id"):
            raise ConfigError(
                "ZeRO-3 has sharded the policy, which is its own reference with adapters off, and "
                "nobody said which engine runs it: call regularizer.bind(engine) after "
                "deepspeed.initialize"
            )
        with self._frozen(), self._policy.ending_in(lambda hidden, _: hidden):
            output = self._forward(input_ids=input_ids, use_cache=False, **self._without_routers)
        return output["logits"] if isinstance(output, dict) else output[0]

    def prefix_states(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after `num_layers` layers; all layers run. Collectives: the engine's."""
        _, layers = decoder_layers(self._policy.model)
        if not 1 <= num_layers <= len(layers):
            raise ConfigError(
                f"the probe reads layer {num_layers}, the reference has layers 1 to {len(layers)}: "
                "fit a probe for this model"
            )
        found: list[Tensor] = []

        def keep(module: nn.Module, args: object, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = layers[num_layers - 1].register_forward_hook(keep)
        try:
            last = self.hidden_states(input_ids)
        finally:
            handle.remove()
        return last if num_layers == len(layers) else found[0]

    @contextmanager
    def gathered_head(self) -> Iterator[Head]:
        """A block in which the head is whole; it opens inside the policy's head, where it is.

        Collectives: none; of a head that is trained whole, one all-gather for each parameter of
        its original.
        """
        head = self.head
        if head.weight is self._policy.head.weight:
            yield head
            return
        with self._gathered(head.parameters) as whole:
            yield head.with_parameters(whole)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """The model in eval mode, with the reference's adapters only, along a trace of its own."""
        trained = [module for module in self._model.modules() if module.training]
        flags = {name: (p, p.requires_grad) for name, p in self._model.named_parameters()}
        for module in trained:
            module.training = False
        try:
            with self._own_trace(), only_adapter(self._model, self._adapter):
                yield
        finally:
            for module in trained:
                module.training = True
            # PEFT trains all that it switches on. FSDP2 may have put whole parameters in the places
            # of its shards, and copies the flags of these later.
            for name, now in self._model.named_parameters():
                before, flag = flags[name]
                before.requires_grad_(flag)
                now.requires_grad_(flag)
