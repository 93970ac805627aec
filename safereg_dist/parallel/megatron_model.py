"""Megatron-core: the calls, layers and head of a chunk, and the frozen reference."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safereg_dist.parallel.megatron import innermost


class ForwardCall(BaseException):
    """Ends a forward step where it calls its model; no `Exception`, so that nobody catches it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = (args, kwargs)


class CallRecorder:
    """A chunk that can tell what it is called with, in place of running."""

    def __init__(self, model: nn.Module) -> None:
        self._plain = model.forward
        self._is_recording = False
        model.forward = self._forward  # type: ignore[method-assign]

    def call_in(self, step: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which `step` calls the chunk; the step ends there."""
        self._is_recording = True
        try:
            step()
        except ForwardCall as found:
            return found.call
        finally:
            self._is_recording = False
        raise RuntimeError("the forward step ended without calling its model")

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_recording:
            raise ForwardCall(args, kwargs)
        return self._plain(*args, **kwargs)


def watch_layer(chunks: Sequence[nn.Module], layer: int, read: Callable[[Tensor], None]) -> bool:
    """Has `read` called with the states behind a decoder layer, [S, B, H], in each forward.

    Layers count from 1; of the last the states are those behind the final norm. Returns
    whether one of these chunks holds it. Layers are found by their `layer_number`.
    """
    for chunk in chunks:
        own: Any = innermost(chunk)
        if layer == own.config.num_layers:
            if getattr(own, "post_process", False):
                own.output_layer.register_forward_pre_hook(lambda _, args: read(args[0].detach()))
                return True
            continue
        for module in own.decoder.layers:
            if module.layer_number == layer:
                module.register_forward_hook(lambda _, __, found: read(_states(found)))
                return True
    return False


def _states(found: Any) -> Tensor:
    """The states of what a layer returns: alone, or before a context."""
    return (found[0] if isinstance(found, tuple) else found).detach()


LossOfStates = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [S, B, H], head [V / tp, H], labels [B, S]) -> loss of every token [B, S]."""


class OutputLayer:
    """The output layer of a chunk, which can hand its states on, and whose loss can be another."""

    def __init__(self, model: nn.Module) -> None:
        self._layer: Any = model.output_layer
        self._model: Any = model
        self._plain, self._plain_loss = self._layer.forward, self._model.compute_language_model_loss
        self._loss: LossOfStates | None = None
        self._gives_states = False
        self._weight: Tensor | None = None
        self._layer.forward = self._forward
        self._model.compute_language_model_loss = self._loss_of_tokens
        self.last_losses: Tensor | None = None
        """[B, S] what the model's own loss was, detached; None where another took its place."""

    @property
    def sequence_parallel(self) -> bool:
        """True if its states are spread over the tensor-parallel group."""
        return bool(self._layer.sequence_parallel)

    @property
    def weight(self) -> Tensor:
        """[V / tp, H]; of a model that ties it to its embedding, that."""
        if self._model.share_embeddings_and_output_weights:
            return self._model.shared_embedding_or_output_weight()
        return self._layer.weight

    @contextmanager
    def giving_states(self) -> Iterator[None]:
        """A block in which a forward without labels returns the layer's input, [B, S, H]."""
        self._gives_states = True
        try:
            yield
        finally:
            self._gives_states = False

    @contextmanager
    def ending_in(self, loss: LossOfStates | None) -> Iterator[None]:
        """A block in which the language-model loss is `loss`; None leaves it as it is."""
        self._loss, self.last_losses = loss, None
        try:
            yield
        finally:
            self._loss = None

    def _forward(self, hidden: Tensor, weight: Tensor | None = None, **how: Any) -> Any:
        if not self._gives_states and self._loss is None:
            return self._plain(hidden, weight=weight, **how)
        self._weight = self._layer.weight if weight is None else weight
        return hidden, None

    def _loss_of_tokens(self, labels: Tensor, states: Tensor) -> Tensor:
        if self._loss is None:
            losses = self._plain_loss(labels, states)
            self.last_losses = losses.detach()
            return losses
        assert self._weight is not None
        return self._loss(states, _Whole.apply(self._weight), labels)


class _Whole(torch.autograd.Function):
    """The identity on a weight; its gradient is one that Megatron's buffer still has to add.

    Where the layer itself adds gradients to the buffer (gradient accumulation fusion) it marks its
    weight, and data parallelism drops the gradient of a marked one.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if hasattr(ctx.weight, "grad_added_to_main_grad"):
            ctx.weight.grad_added_to_main_grad = False
        return grads[0]


def whole_sequence(states: Tensor, *, is_spread: bool, is_trained: bool) -> Tensor:
    """[S, B, H] of the states of an output layer.

    `is_spread` over the tensor-parallel group: gathered, and the gradient, of which every rank has
    its share of the vocabulary, is summed on the way back. Collectives: then an all-gather, and in
    the backward a reduce-scatter.
    """
    if not is_spread:
        return states
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=is_trained)


# ---- the reference


class PipelinedReference:
    """A frozen model in the policy's layout, run forward-only through Megatron's schedule."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        """`chunks` are this rank's, as the policy's; they are frozen here."""
        from megatron.core.transformer.module import Float16Module

        wrapped = []
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
            config = _forward_only(chunk.config)
            chunk.config = config
            half = config.fp16 or config.bf16
            wrapped.append(Float16Module(config, chunk) if half else chunk)
        self.chunks = wrapped
        self.running = 0
        """The place in `calls` of the micro-batch that a chunk is called for."""
        last: Any = innermost(wrapped[-1])
        self.output = OutputLayer(last) if getattr(last, "post_process", False) else None

    def states(
        self,
        schedule: Callable[..., Any],
        arguments: dict[str, Any],
        calls: Sequence[Sequence[tuple[tuple[Any, ...], dict[str, Any]]]],
        *,
        num_layers: int | None = None,
    ) -> list[Tensor]:
        """[S, B, H] of each micro-batch, on the last stage; else an empty list.

        `calls` are the arguments of each chunk of this rank for each micro-batch; of micro-batches
        that are many enough for the schedule. Only the first `num_layers` layers run, where given:
        behind them states are handed on. Collectives: those of the schedule's forward.
        """
        place = {id(chunk): number for number, chunk in enumerate(self.chunks)}
        own = next(self.chunks[0].parameters()).dtype

        def step(iterator: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            self.running = next(iterator)
            args, kwargs = calls[place[id(chunk)]][self.running]
            kept = {k: v for k, v in kwargs.items() if k not in ("labels", "loss_mask")}
            # A module of half precision gives float32 behind its last stage: the same values.
            return chunk(*args, **kept), lambda states, non_loss_data: states.detach().to(own)

        count = len(calls[0])
        iterators = [iter(range(count)) for _ in self.chunks]
        is_one = len(self.chunks) == 1
        how = arguments | {
            "forward_step_func": step,
            "model": self.chunks[0] if is_one else self.chunks,
            "data_iterator": iterators[0] if is_one else iterators,
            "num_microbatches": count,
            "forward_only": True,
            "collect_non_loss_data": True,
        }
        with torch.no_grad(), ExitStack() as block:
            if self.output is not None:
                block.enter_context(self.output.giving_states())
            if num_layers is not None:
                block.enter_context(_stopped_after(num_layers, self.chunks))
            found = schedule(**how)
        return [] if self.output is None else [states.transpose(0, 1) for states in found]


@contextmanager
def _stopped_after(num_layers: int, chunks: Sequence[nn.Module]) -> Iterator[None]:
    """A block in which later decoder layers do not run."""
    decoders: list[Any] = [innermost(chunk).decoder for chunk in chunks]
    whole = [decoder.layers for decoder in decoders]
    for decoder, layers in zip(decoders, whole, strict=True):
        decoder.layers = nn.ModuleList(x for x in layers if x.layer_number <= num_layers)
    try:
        yield
    finally:
        for decoder, layers in zip(decoders, whole, strict=True):
            decoder.layers = layers


def _forward_only(config: Any) -> Any:
    """The configuration without what a training loop hangs on it for the policy's gradients."""
    plain = copy.copy(config)
    for name in ("no_sync_func", "grad_sync_func", "param_sync_func", "timers"):
        setattr(plain, name, None)
    plain.finalize_model_grads_func = None
    return plain
