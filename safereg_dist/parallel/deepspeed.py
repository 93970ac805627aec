"""The DeepSpeed backend: policy under ZeRO-3, reference under ZeRO-3 inference, same groups.

The only file that imports deepspeed; `zero_config` builds its configuration.
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    FROZEN_PARAM_FRAGMENTS,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    InflightParamRegistry,
    PartitionedParameterCoordinator,
)
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from safereg_dist.config import Config, EngineConfig
from safereg_dist.errors import CheckpointError, GroupError
from safereg_dist.models.architecture import build_model, read_architecture
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Adapt, Update
from safereg_dist.parallel.optimizer import parameter_groups
from safereg_dist.parallel.pickles import load_tensors, only_tensors
from safereg_dist.parallel.rendezvous import join_group
from safereg_dist.parallel.shards import (
    Shard,
    StoredHead,
    dtype_of,
    fill_adapters,
    fill_shards,
    fingerprint,
    first_not_finite,
    load_shards,
    stored_head,
    whole_shard,
)
from safereg_dist.parallel.single import SingleBackend
from safereg_dist.parallel.zero_config import hidden_size_of, policy_config, zero_config
from safereg_dist.parallel.zero_files import (
    WEIGHTS,
    FlatTensors,
    Part,
    WrittenShards,
    parts_of_mappings,
    parts_of_shapes,
)
from safereg_dist.regions import OPTIMIZER, POLICY_BACKWARD, POLICY_FORWARD, region
from safereg_dist.types import Head

_TAG = "engine"
_SHARD_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")

# DeepSpeed's all-reduce through shared memory on CPU serves inference engines, which we do not use.
# Loading it would first compile it (40 s), and each run would leave 69 MB per rank in /dev/shm
# (deepspeed 0.19 never unlinks them), until the machine has no memory left.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# deepspeed 0.19 calls collectives by names that torch 2.13 has renamed; nothing a user can do.
# Goes when the lower bound of deepspeed uses the new names.
warnings.filterwarnings("ignore", message=r".*`torch\.distributed\..*` is deprecated.*")


def start_ranks(config: EngineConfig) -> Ranks:
    """Joins the process group that the launcher describes; alone where there is no launcher.

    Raises:
        GroupError: the launcher's environment is incomplete, the group cannot be formed, or
            `engine.hpz_partition_size` does not divide it.
    Collectives: the rendezvous, and one gather of texts.
    """

    def form_group(backend: str, timeout: timedelta) -> None:
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
        )

    ranks = join_group(config.timeout_s, form_group)
    with ranks.together():
        _check_secondary_groups(config.hpz_partition_size, ranks.world_size)
    return ranks


def _check_secondary_groups(size: int, world_size: int) -> None:
    if world_size % size:
        divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise GroupError(
            f"expected engine.hpz_partition_size to divide the number of ranks, {world_size}, got "
            f"{size}: choose one of {divisors} (best the GPUs of one node; 1 is none)"
        )


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """A block in which these parameters are whole. Collectives: one all-gather each."""
    # Gathers as deepspeed's modules do: GatheredParameters synchronises the whole device.
    asked = list(parameters)
    unique: list[Any] = list(dict.fromkeys(asked))
    absent = [p for p in unique if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    for handle in [p.all_gather_coalesced([p]) for p in absent]:
        handle.wait()
    try:
        yield asked
    finally:
        for parameter in absent:
            parameter.partition()


class DeepSpeedBackend:
    """Shards models with ZeRO-3 (see `engine.Backend` for the contract of each method)."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def load_model(
        self,
        folder: Path,
        *,
        precision: str,
        offload: str,
        hpz_partition_size: int = 1,
        quantize: str = "none",
        adapt: Adapt | None = None,
    ) -> PreTrainedModel:
        """A model built under `zero.Init`, each rank reading just its own shard of every tensor.

        If `hpz_partition_size` is not 1, groups of that many neighbouring ranks share a second
        copy of the weights; at most one model of a process can have one (deepspeed 0.19).

        Raises:
            ConfigError: the weights do not fit the architecture.
        Collectives: those of `zero.Init`, and one gather of texts.
        """
        dtype = dtype_of(precision)
        settings = zero_config(
            precision=precision,
            offload=offload,
            rows=1,
            hidden_size=None,
            hpz_partition_size=hpz_partition_size,
        )
        with self.ranks.together():
            architecture = read_architecture(folder)
        with _hf_zero3(settings):
            model = build_model(architecture, dtype=dtype)
        with self.ranks.together():
            load_shards(model, folder, self._shard_of)
        for parameter in model.parameters():
            # With hpZ the second shard still holds the random initial weights, and the first step
            # would run on them. Once it is removed, the next gather rebuilds it from the shards.
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
        if adapt is not None:  # whole on every rank, until the engine shards them
            with self.ranks.together():
                fill_adapters(model, adapt(model), whole_shard)
        return model

    def load_head(self, folder: Path, *, precision: str) -> Head:
        """The frozen head alone, sharded; each rank reads its own shard of it.

        Raises:
            ConfigError: the folder holds no causal language model, or not all of its weights.
        Collectives: those of `zero.Init`, and two gathers of texts.
        """
        with self.ranks.together():
            stored = stored_head(folder)
        settings = zero_config(precision=precision, offload="none", rows=1, hidden_size=None)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            head = _FrozenHead(stored)
        places = zip(head.parameters(), stored.parameters, strict=True)
        with self.ranks.together():
            fill_shards(list(places), self._shard_of)
        return Head(head.weight, head.bias, stored.softcap, stored.scale)

    def wrap_policy(self, model: PreTrainedModel, *, config: Config) -> "DeepSpeedPolicy":
        """The ZeRO-3 training engine of `model`."""
        return _policy(model, config, self.ranks)

    def wrap_reference(self, trunk: nn.Module, *, offload: str, rows: int) -> "DeepSpeedReference":
        """The ZeRO-3 inference engine of the frozen `trunk`: no optimizer, no new groups."""
        trunk.requires_grad_(False)
        precision = "bf16" if next(trunk.parameters()).dtype == torch.bfloat16 else "fp32"
        engine, *_ = deepspeed.initialize(
            model=trunk,
            config=zero_config(
                precision=precision, offload=offload, rows=rows, hidden_size=hidden_size_of(trunk)
            ),
        )
        engine.eval()  # `initialize` leaves it in training mode, with dropout on
        return DeepSpeedReference(engine)

    def gathered(
        self, parameters: Iterable[nn.Parameter]
    ) -> AbstractContextManager[list[nn.Parameter]]:
        """A block in which these parameters are whole. Collectives: one all-gather each."""
        return gathered(parameters)

    def first_not_finite(self, model: nn.Module) -> str | None:
        """Name of a parameter with a non-finite value in its shard, or None. No collectives."""
        return first_not_finite(model, self._shard_of)

    def fingerprint(self, model: nn.Module, adapters: Sequence[str] = ()) -> str:
        """Fingerprint from every rank's shard. Collectives: one SUM of 16 bytes a parameter."""
        return fingerprint(model, self._shard_of, self.ranks, adapters)

    def _shard_of(self, parameter: nn.Parameter) -> Shard:
        """This rank's part; the last rank's is padded, and shorter without."""
        if not hasattr(parameter, "ds_tensor"):
            return whole_shard(parameter)  # of an adapter that the engine has yet to shard
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        numel = parameter.ds_numel  # type: ignore[attr-defined]
        first = min(self.ranks.rank * size, numel)
        length = min(size, numel - first)
        return Shard(first, parameter.ds_tensor.view(-1)[:length])  # type: ignore[attr-defined]


class ReplicatedBackend(SingleBackend):
    """ZeRO-1 and 2: whole weights on every rank, gradients or optimizer state in shards."""

    def wrap_policy(self, model: PreTrainedModel, *, config: Config) -> "DeepSpeedPolicy":
        """The ZeRO training engine of `model`."""
        return _policy(model, config, self.ranks)


def _policy(model: PreTrainedModel, config: Config, ranks: Ranks) -> "DeepSpeedPolicy":
    optimizer = _build_optimizer(model, config)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=policy_config(model, config)
    )
    return DeepSpeedPolicy(engine, ranks)


class _FrozenHead(nn.Module):
    """The module that `zero.Init` shards in place of a whole model; it is never run."""

    def __init__(self, stored: StoredHead) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stored.weight.shape), requires_grad=False)
        self.bias = None
        if stored.bias is not None:
            self.bias = nn.Parameter(torch.empty(stored.bias.shape), requires_grad=False)


class DeepSpeedPolicy:
    """`engine.PolicyEngine` over a DeepSpeed training engine."""

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        self.engine = self.run = engine
        self.module: nn.Module = engine.module
        self._ranks = ranks

    @region(POLICY_FORWARD)
    def __call__(self, input_ids: Tensor, **positions: Tensor) -> Tensor:
        """Forward of one micro-batch under ZeRO's hooks."""
        # Rows are padded on the right, so under a causal mask no real token sees padding. A mask of
        # its own would rule out attention's fastest kernel and need a host synchronisation.
        return self.engine(input_ids=input_ids, use_cache=False, **positions).logits

    @region(POLICY_BACKWARD)
    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`; reduced over ranks on the last micro-batch of a step.

        DeepSpeed averages gradients over ranks. The loss is already divided by the global number
        of tokens, so the average is undone here, and nowhere else. Collectives: the engine's own.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * self._ranks.world_size, scale_wrt_gas=False)

    @region(OPTIMIZER)
    def update(self, lr: float) -> Update:
        """One optimizer step; skipped by all ranks where any gradient is not finite."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        applied = not bool(self.engine.optimizer.overflow)
        return Update(applied, float("inf") if norm is None else float(norm))

    def save(self, folder: Path) -> None:
        """DeepSpeed's own checkpoint below `folder`."""
        self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restores DeepSpeed's own checkpoint, also of another number of ranks.

        Raises:
            CheckpointError: DeepSpeed found none, or a file asks for a class that is not listed.
        Collectives: DeepSpeed's own, and gathers of texts.
        """
        written = _optimizer_files(folder / _TAG)
        if written and len(written) != self._ranks.world_size:
            return self._load_of_other_ranks(folder / _TAG, written)
        with only_tensors():  # deepspeed 0.19 unpickles whatever its files say
            path, _ = self.engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise CheckpointError(f"expected a DeepSpeed checkpoint in {folder}, found none")

    def _load_of_other_ranks(self, folder: Path, written: Sequence[Path]) -> None:
        engine, optimizer = self.engine, self.engine.optimizer
        is_sharded = engine.zero_optimization_partition_weights()
        name = "zero_pp_rank_0_mp_rank_00" if is_sharded else "mp_rank_00"
        with self._ranks.together():
            whole = _mapped(folder / f"{name}_model_states.pt")
            states = [_mapped(path)[OPTIMIZER_STATE_DICT] for path in written]
            if is_sharded:
                own = self._resharded_stage3(states, whole[PARAM_SHAPES])
                # Of the ranks that wrote it; these weights are as they were loaded.
                whole[FROZEN_PARAM_FRAGMENTS] = None
            else:
                own = self._resharded(states)
        if is_sharded:
            optimizer.checkpoint_event_prologue()
        engine.load_module_state_dict(whole)
        optimizer.load_state_dict([own] * self._ranks.world_size, load_from_fp32_weights=True)
        if is_sharded:
            optimizer.checkpoint_event_epilogue()
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, counter, whole[counter])

    def _resharded_stage3(self, states: Sequence[Any], shapes: Sequence[Any]) -> dict[str, Any]:
        """This rank's state of the optimizer, from that of all ranks that wrote a checkpoint."""
        ranks, count = self._ranks, len(states)
        written = WrittenShards(
            [_flat_tensors(each[FP32_FLAT_GROUPS], each[OPTIMIZER_STATE_DICT]) for each in states],
            [parts_of_shapes(shapes, rank, count) for rank in range(count)],
        )
        state = self.engine.optimizer.state_dict()
        parts = parts_of_shapes(self.engine._get_zero_param_shapes(), ranks.rank, ranks.world_size)
        flat = state[FP32_FLAT_GROUPS]
        groups = [written.group(parts, i, each.numel()) for i, each in enumerate(flat)]
        state[FP32_FLAT_GROUPS] = [group.pop(WEIGHTS) for group in groups]
        state[OPTIMIZER_STATE_DICT]["state"] = dict(enumerate(groups))
        return state

    def _resharded(self, states: Sequence[Any]) -> dict[str, Any]:
        """The same of ZeRO-1 and 2."""
        kept, weights = BASE_OPTIMIZER_STATE, SINGLE_PARTITION_OF_FP32_GROUPS
        written = WrittenShards(
            [_flat_tensors(each[weights], each[kept]) for each in states],
            parts_of_mappings([each[PARAM_SLICE_MAPPINGS] for each in states]),
        )
        optimizer = self.engine.optimizer
        state = optimizer.state_dict()
        parameters = {name: p for p, name in self.engine.param_names.items()}
        parts = {
            name: Part(
                i, each.start, parameters[name]._hp_mapping.lp_fragment_address.start, each.numel
            )
            for i, named in enumerate(state[PARAM_SLICE_MAPPINGS])
            for name, each in named.items()
        }
        flat = optimizer.single_partition_of_fp32_groups
        groups = [written.group(parts, i, each.numel()) for i, each in enumerate(flat)]
        state[weights] = [group.pop(WEIGHTS) for group in groups]
        state[kept]["state"] = dict(enumerate(groups))
        return state


def _optimizer_files(folder: Path) -> list[Path]:
    """The files of the optimizer's shards, by rank."""
    found = ((_SHARD_FILE.fullmatch(path.name), path) for path in folder.glob("*_optim_states.pt"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _flat_tensors(weights: Sequence[Tensor], optimizer: Any) -> FlatTensors:
    return [{WEIGHTS: flat, **optimizer["state"][i]} for i, flat in enumerate(weights)]


def _mapped(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, its tensors mapped; runs no code of the file's."""
    return load_tensors(path, map_location="cpu", mmap=True)


class DeepSpeedReference:
    """`engine.ReferenceEngine` over a ZeRO-3 inference engine.

    ZeRO-3 records the order in which modules run and prefetches along it. The full pass and the
    prefix pass run different modules, so each gets a coordinator, and with it a trace, of its own;
    sharing one leaves parameters gathered between steps.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.module: nn.Module = engine.module
        self._prefix: dict[int, SeparateTrace] = {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """[B, S, H] last hidden states. Collectives: one all-gather per decoder layer."""
        return self.engine(input_ids)

    @torch.no_grad()
    def prefix(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after `num_layers` layers. Collectives: one all-gather per layer run."""
        if num_layers not in self._prefix:
            self._prefix[num_layers] = SeparateTrace(self.engine.optimizer)
        with self._prefix[num_layers]():
            return self.engine(input_ids, num_layers=num_layers)


class SeparateTrace:
    """A coordinator of ZeRO-3's own kind for passes that run modules in another order."""

    def __init__(self, offload: Any, *, forgetful: Sequence[nn.Module] = ()) -> None:
        """`offload` is the engine's DeepSpeedZeRoOffload.

        `forgetful` modules do not read in these passes what they read of others' parameters in
        the engine's other passes: ZeRO-3 would gather it, and find another order than it recorded.
        """
        self._offload = offload
        self._forgetful = forgetful
        self._coordinator = PartitionedParameterCoordinator(
            prefetch_bucket_sz=offload._prefetch_bucket_sz,
            max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
            allgather_stream=offload._DeepSpeedZeRoOffload__allgather_stream,
            inflight_param_registry=InflightParamRegistry(),
            timers=offload.timers,
        )

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A block in which the engine records and prefetches along this trace."""
        before = self._offload.param_coordinator
        known = [(m, m._external_params) for m in self._forgetful if hasattr(m, "_external_params")]
        for module, _ in known:
            module._external_params = {}  # type: ignore[assignment]
        self._offload.param_coordinator = self._coordinator
        try:
            yield
        finally:
            self._offload.param_coordinator = before
            for module, read in known:
                module._external_params = read


def _build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": config.optimizer.lr,
        "betas": (config.optimizer.beta1, config.optimizer.beta2),
        "eps": config.optimizer.eps,
    }
    groups = parameter_groups(model, config.optimizer.weight_decay)
    if config.engine.offload_optimizer == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **options)


@contextmanager
def _hf_zero3(settings: dict[str, Any]) -> Iterator[None]:
    """A block in which transformers builds models under `zero.Init` with this configuration."""
    # transformers keeps a weak reference: the object must live until the block ends.
    before = hf_deepspeed._hf_deepspeed_config_weak_ref
    keep_alive = hf_deepspeed.HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        del keep_alive
        hf_deepspeed._hf_deepspeed_config_weak_ref = before
