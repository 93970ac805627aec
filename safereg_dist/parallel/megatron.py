"""Megatron-core: the places of a layout, its schedules, and how a model is built and filled.

A data-parallel replica is spread over tensor-, context- and pipeline-parallel ranks. Its *owner* is
the rank that sees its rows and their losses: the first tensor- and context-parallel rank of the
last pipeline stage.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    pp_group: dist.ProcessGroup
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
            pp_group=state.get_pipeline_model_parallel_group(),
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

    def from_stage(self, tensor: Tensor, stage: int) -> Tensor:
        """The tensor of a stage of this pipeline, in place. Collectives: a broadcast."""
        if self.pp_group.size() > 1:
            source = dist.get_process_group_ranks(self.pp_group)[stage]
            dist.broadcast(tensor, source, group=self.pp_group)
        return tensor

    def from_owner(self, tensor: Tensor) -> Tensor:
        """The owner's tensor on all ranks of its replica, in place. Collectives: two broadcasts."""
        if self.is_last_stage:
            self.from_first_of_head(tensor)
        return self.from_stage(tensor, self.pp_group.size() - 1)

    def positions(self, length: int, *, is_spread: bool) -> Tensor:
        """[S_own] places in a sequence of `length` of the states between this rank's layers.

        `is_spread` over the tensor-parallel group: sequence parallelism.
        """
        own = self.own_tokens(torch.arange(length))
        return own.chunk(self.tp_group.size())[self.tp_rank] if is_spread else own

    def sum_of_sequence(self, tensor: Tensor, *, is_spread: bool) -> Tensor:
        """Summed, in place, over the ranks with other positions; not over those with the same.

        Collectives: a SUM over context-parallel ranks, and where `is_spread` one over
        tensor-parallel ranks.
        """
        for group in (self.tp_group, self.cp_group) if is_spread else (self.cp_group,):
            if group.size() > 1:
                dist.all_reduce(tensor, group=group)
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


def listed(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The chunks of what a schedule is given as its model."""
    return [model] if isinstance(model, nn.Module) else list(model)


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


# ---- building a model


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
