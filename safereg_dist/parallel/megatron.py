"""Megatron-core: the places of a layout, its schedules, and a head that gives states or a loss.

A data-parallel replica is spread over tensor-, context- and pipeline-parallel ranks. Its *owner* is
the rank that sees its rows and their losses: the first tensor- and context-parallel rank of the
last pipeline stage.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from safereg_dist.errors import ConfigError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.distributed import current_ranks

SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)
"""Megatron's three schedules, which `get_forward_backward_func` looks up by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where this rank stands, and the groups that Megatron has formed; none is added."""

    world: Ranks
    """All ranks of the run."""
    data: Ranks
    """The ranks that stand where this one does in the other data-parallel replicas."""
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    head_group: dist.ProcessGroup
    """The tensor- and context-parallel ranks of this stage of this replica."""
    is_last_stage: bool
    shares_experts: bool
    """True if experts are spread over data-parallel ranks: then all replicas run alike."""
    group_of_micro_batches: int
    """An interleaved schedule runs multiples of so many; others any number (1)."""

    @classmethod
    def current(cls) -> "Layout":
        """That of `megatron.core.parallel_state`. Collectives: none."""
        from megatron.core import parallel_state

        state: Any = parallel_state
        is_interleaved = state.get_virtual_pipeline_model_parallel_world_size() is not None
        stages = state.get_pipeline_model_parallel_world_size()
        world = current_ranks()
        data = Ranks(
            rank=state.get_data_parallel_rank(),
            world_size=state.get_data_parallel_world_size(),
            local_rank=world.local_rank,
            device=world.device,
            dp_group=state.get_data_parallel_group(),
        )
        return cls(
            world=world,
            data=data,
            tp_group=state.get_tensor_model_parallel_group(),
            cp_group=state.get_context_parallel_group(),
            head_group=state.get_tensor_and_context_parallel_group(),
            is_last_stage=state.is_pipeline_last_stage(ignore_virtual=True),
            shares_experts=state.get_expert_model_parallel_world_size() > 1,
            group_of_micro_batches=stages if is_interleaved else 1,
        )

    @property
    def tp_rank(self) -> int:
        """Place in the tensor-parallel group."""
        return self.tp_group.rank()

    @property
    def is_first_of_head(self) -> bool:
        """True on the first tensor- and context-parallel rank of a stage."""
        return self.head_group.rank() == 0

    @property
    def is_owner(self) -> bool:
        """True on the rank that sees this replica's rows and losses."""
        return self.is_last_stage and self.is_first_of_head

    def from_first_of_head(self, tensor: Tensor) -> Tensor:
        """The tensor of the first rank of `head_group`, in place. Collectives: a broadcast."""
        if self.head_group.size() > 1:
            source = dist.get_process_group_ranks(self.head_group)[0]
            dist.broadcast(tensor, source, group=self.head_group)
        return tensor

    def own_tokens(self, tensor: Tensor) -> Tensor:
        """[..., S / cp] of [..., S]: this context-parallel rank's two of 2 cp pieces (zigzag)."""
        count, rank = self.cp_group.size(), self.cp_group.rank()
        if count == 1:
            return tensor
        pieces = tensor.chunk(2 * count, dim=-1)
        return torch.cat([pieces[rank], pieces[2 * count - 1 - rank]], dim=-1)

    def all_tokens(self, tensor: Tensor) -> Tensor:
        """The inverse of `own_tokens`. Collectives: an all-gather over context-parallel ranks."""
        count = self.cp_group.size()
        if count == 1:
            return tensor
        found = [torch.empty_like(tensor) for _ in range(count)]
        dist.all_gather(found, tensor.contiguous(), group=self.cp_group)
        pairs = [part.chunk(2, dim=-1) for part in found]
        return torch.cat([a for a, _ in pairs] + [b for _, b in reversed(pairs)], dim=-1)


def innermost(chunk: nn.Module) -> nn.Module:
    """The model inside what data parallelism and mixed precision put around it."""
    while hasattr(chunk, "module") and not hasattr(chunk, "decoder"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


# ---- schedules

Around = Callable[[Callable[..., Any], dict[str, Any]], Any]
"""(schedule, its arguments) -> its result."""
MARK = "safereg_around"
"""The attribute of a forward step that holds what runs around its schedule."""


def watch_schedules() -> None:
    """From now on a forward step with the attribute `MARK` has its schedule run by that.

    A pipeline's stages begin to wait for one another before any forward step is called, so what
    must come first has to stand around the whole schedule. Other forward steps run as before.
    """
    from megatron.core.pipeline_parallel import schedules

    for name in SCHEDULES:
        plain = getattr(schedules, name)
        if not hasattr(plain, MARK):
            setattr(schedules, name, _watched(plain))


def _watched(schedule: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(schedule)
    def watched(**arguments: Any) -> Any:
        step = arguments["forward_step_func"]
        while isinstance(step, functools.partial):  # Megatron-Bridge binds its state
            step = step.func
        around: Around | None = getattr(step, MARK, None)
        return schedule(**arguments) if around is None else around(schedule, arguments)

    setattr(watched, MARK, True)
    return watched


# ---- chunks of a model


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
        last: Any = innermost(wrapped[-1])
        self.output = OutputLayer(last) if getattr(last, "post_process", False) else None

    def states(
        self,
        schedule: Callable[..., Any],
        arguments: dict[str, Any],
        calls: Sequence[Sequence[tuple[tuple[Any, ...], dict[str, Any]]]],
    ) -> list[Tensor]:
        """[S, B, H] of each micro-batch, on the last stage; else an empty list.

        `calls` are the arguments of each chunk of this rank for each micro-batch; of micro-batches
        that are many enough for the schedule. Collectives: those of the schedule's forward.
        """
        place = {id(chunk): number for number, chunk in enumerate(self.chunks)}

        def step(iterator: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            args, kwargs = calls[place[id(chunk)]][next(iterator)]
            kept = {k: v for k, v in kwargs.items() if k not in ("labels", "loss_mask")}
            return chunk(*args, **kept), lambda states, non_loss_data: states.detach()

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
        giving = nullcontext() if self.output is None else self.output.giving_states()
        with torch.no_grad(), giving:
            found = schedule(**how)
        return [] if self.output is None else [states.transpose(0, 1) for states in found]


def _forward_only(config: Any) -> Any:
    """The configuration without what a training loop hangs on it for the policy's gradients."""
    plain = copy.copy(config)
    for name in ("no_sync_func", "grad_sync_func", "param_sync_func", "timers"):
        setattr(plain, name, None)
    plain.finalize_model_grads_func = None
    return plain


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """A block after which the generators go on as if it had not been."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    states = {name: state.clone() for name, state in tracker.get_states().items()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    tracker.set_states(states)


def read_checkpoint(folder: Path, chunks: Sequence[nn.Module], world: Ranks) -> None:
    """Fills the chunks from a checkpoint of `dist_checkpointing`.

    Raises:
        ConfigError: there is none, on all ranks.
    Collectives: the library's own; a gather of texts.
    """
    from megatron.core import dist_checkpointing

    with world.together():
        latest = folder / "latest_checkpointed_iteration.txt"
        if latest.is_file():
            folder = folder / f"iter_{int(latest.read_text()):07d}"
        if not (folder / "metadata.json").is_file():
            raise ConfigError(
                f"expected a checkpoint of Megatron's dist_checkpointing in reference.model="
                f"{folder}, which has no metadata.json: give the folder that `--save` wrote"
            )
    wanted = {f"model{i}": c.sharded_state_dict() for i, c in enumerate(chunks)}  # type: ignore[operator]
    found: Any = dist_checkpointing.load(wanted, str(folder))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(found[f"model{i}"], strict=False)
