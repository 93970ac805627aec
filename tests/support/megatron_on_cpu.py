"""Makes megatron-core's schedules and layers run on CPUs over gloo; a test's helper alone.

`patch()` before anything of `megatron` is imported. What it changes: CUDA's devices, streams,
events and generators become the CPU's or nothing; a `device="cuda"` given to any function of torch
means the CPU, and nothing is pinned; a tensor says that its type is a CUDA one's; torch's norms are
built as without sequence parallelism, and their weights are marked; `typing.override` is there on
Python 3.11; a router finds Transformer Engine's product missing; sizes of an all-to-all are lists.
Nothing is compiled (a router would be, by a C++ compiler); the queue of a checkpoint's writers is
forked, since a spawned process would load every library again.
Interleaved schedules need `batch_p2p_comm=False`. `ContextAttention` stands in for Transformer
Engine's attention, which alone knows context parallelism: it gathers keys and values over the
group.
"""

import contextlib
import copy
import functools
import multiprocessing
import os
import sys
import typing
import warnings
from multiprocessing import util
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch import distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Nothing:
    """A stream or an event without a device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: _Nothing()

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _is_cuda(device: Any) -> bool:
    return str(getattr(device, "type", device)).startswith("cuda")


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and (_is_cuda(kwargs["device"]) or isinstance(kwargs["device"], int)):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        if func is Tensor.to:
            args = tuple(CPU if not isinstance(a, Tensor) and _is_cuda(a) else a for a in args)
        return func(*args, **kwargs)


def patch() -> None:
    """From now on, in this process."""
    warnings.filterwarnings("ignore")
    torch._dynamo.config.disable = True
    if not hasattr(typing, "override"):
        from typing_extensions import override

        typing.override = override
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.Stream = cuda.Event = _Nothing
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _Nothing()
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.synchronize = lambda *_, **__: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    plain_exchange = dist.all_to_all_single

    def with_lists(out: Tensor, given: Tensor, *sizes: Any, **how: Any) -> Any:
        known = [size.tolist() if hasattr(size, "tolist") else size for size in sizes]
        how = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in how.items()}
        return plain_exchange(out, given, *known, **how)

    dist.all_to_all_single = with_lists
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    plain = torch_norm.WrappedTorchNorm.__new__

    def marked(cls: Any, config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = plain(cls, without, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = marked
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = _forked_queue
    _OnCpu().__enter__()


@functools.cache
def _forked_queue() -> Any:
    return multiprocessing.get_context("fork").Manager().Queue()


def leave() -> None:
    """Ends this process, and those that Megatron's checkpoints have started, without waiting."""
    util._run_finalizers()
    os._exit(0)


def unpacked(folder: str) -> None:
    """Imports megatron from an unpacked wheel in `folder`, where one is given."""
    if folder:
        sys.path.insert(0, folder)


class ContextAttention(nn.Module):
    """Causal attention in place of Transformer Engine's; its sequences may lie over a group."""

    def __init__(self, config: Any, *_: Any, pg_collection: Any = None, **__: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        from megatron.core import parallel_state

        group = parallel_state.get_context_parallel_group()
        count, rank = group.size(), group.rank()
        length = query.shape[0]
        keys, values = (_Gather.apply(t.contiguous(), group) for t in (key, value))
        own = _positions(length, count, rank)
        everywhere = torch.cat([_positions(length, count, other) for other in range(count)])
        repeats = query.shape[2] // keys.shape[2]
        keys, values = (t.repeat_interleave(repeats, dim=2) for t in (keys, values))
        scores = torch.einsum("sbnd,tbnd->bnst", query, keys) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(everywhere[None, :] > own[:, None], float("-inf"))
        found = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), values)
        return found.flatten(2)


def _positions(length: int, count: int, rank: int) -> Tensor:
    """Positions of a rank's two pieces of the sequence (zigzag)."""
    half = length // 2
    places = (rank, 2 * count - 1 - rank)
    return torch.cat([torch.arange(p * half, (p + 1) * half) for p in places])


class _Gather(torch.autograd.Function):
    """[count * s, ...] of every rank's [s, ...]; the gradient of each piece is summed."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        found = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(found, own, group=group)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        whole = grads[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)
        return whole.chunk(ctx.group.size())[ctx.group.rank()], None
