"""The FSDP2 backend: policy and reference under torch's `fully_shard`, on the ranks' own group.

A model is sharded in units: each decoder layer, the embedding, the head, and what is left of the
base model (its final norm). A unit is gathered around its module's forward and backward. The base
model and the head are roots of their own, so that a reference can run its trunk without its head.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shared
from torch.distributed.checkpoint.state_dict_saver import save as save_shared
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardedDim
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from safereg_dist.config import Config, EngineConfig
from safereg_dist.errors import CheckpointError, ConfigError, reason_of
from safereg_dist.models.architecture import build_model, decoder_layers, read_architecture
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Adapt, Update
from safereg_dist.parallel.optimizer import parameter_groups
from safereg_dist.parallel.pickles import MetadataReader, only_tensors
from safereg_dist.parallel.rendezvous import join_group
from safereg_dist.parallel.shards import (
    Shard,
    StoredParameter,
    dtype_of,
    fill_adapters,
    fill_shards,
    fingerprint,
    first_not_finite,
    load_shards,
    stored_head,
)
from safereg_dist.parallel.single import SingleReference
from safereg_dist.regions import OPTIMIZER, POLICY_BACKWARD, POLICY_FORWARD, region
from safereg_dist.types import Head

WHOLE_GRADIENT_BYTES = 8 << 30
"""Float32 gradients up to which a model's wait whole on every rank for the last micro-batch, and
are reduced once; those of more than two billion parameters are reduced after each, and only shards
wait, since they would not fit beside the model."""


def start_ranks(config: EngineConfig) -> Ranks:
    """Joins the process group that the launcher describes; alone where there is no launcher.

    Raises:
        GroupError: the launcher's environment is incomplete, or the group cannot be formed.
    Collectives: the rendezvous.
    """
    return join_group(
        config.timeout_s,
        lambda backend, timeout: dist.init_process_group(backend, timeout=timeout),
    )


class Fsdp2Backend:
    """Shards models with FSDP2 (see `engine.Backend` for the contract of each method).

    It may hold the reference of a policy that another engine trains, on the same ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        assert ranks.dp_group is not None
        self.ranks = ranks
        self._mesh = DeviceMesh.from_group(ranks.dp_group, ranks.device.type)
        # Parameters that are kept in float32 and gathered in another type.
        self._gathered_as = WeakTensorKeyDictionary()

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
        """A model built without memory, each rank reading just its own rows of every tensor.

        Raises:
            ConfigError: the weights do not fit the architecture, or it has a parameter outside
                its base model and its head.
        Collectives: two gathers of texts.
        """
        with self.ranks.together():
            architecture = read_architecture(folder)
            with _whole_modules(), _parameters_without_memory():
                model = build_model(architecture, dtype=dtype_of(precision))
                values = None if adapt is None else adapt(model)
            self._shard(model, precision=precision, offload=offload)
            self._allocate(model, offload=offload)
            load_shards(model, folder, self._shard_of)
            if values is not None:
                fill_adapters(model, values, self._shard_of)
        return model

    def _shard(self, model: PreTrainedModel, *, precision: str, offload: str) -> None:
        base, embedding, head = model.base_model, _embedding_of(model), _head_of(model)
        units = [*decoder_layers(model)[1], embedding, base]
        if not _is_tied(model):
            units.append(head)
        for unit in units:
            fully_shard(
                unit,
                mesh=self._mesh,
                reshard_after_forward=True,  # the default leaves a root's parameters whole
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=dtype_of(precision),
                    reduce_dtype=torch.float32,
                    cast_forward_inputs=False,
                ),
                offload_policy=_offload_policy(offload),
            )
        model.tie_weights()
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        if whole:
            raise ConfigError(
                f"{type(model).__name__} has parameters outside its base model and its head, the "
                f"first is {whole[0]!r}: use engine.name=deepspeed"
            )

    def _allocate(self, model: PreTrainedModel, *, offload: str) -> None:
        device = torch.device("cpu") if offload == "cpu" else self.ranks.device
        _replace_tensors(
            model,
            lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(self.ranks.device),
        )

    def load_head(self, folder: Path, *, precision: str) -> Head:
        """The frozen head alone, sharded; each rank reads its own rows of it.

        Raises:
            ConfigError: the folder holds no causal language model, or not all of its weights.
        Collectives: one gather of texts.
        """
        with self.ranks.together():
            stored = stored_head(folder)
            places = [
                (self._empty(place, dtype_of(precision)), place) for place in stored.parameters
            ]
            fill_shards(places, self._shard_of)
        weight, bias = [*(parameter for parameter, _ in places), None][:2]
        return Head(weight, bias, stored.softcap, stored.scale)

    def _empty(self, place: StoredParameter, dtype: torch.dtype) -> nn.Parameter:
        """A frozen parameter, sharded as `fully_shard` does; its values are undefined."""
        whole = torch.empty(place.shape, device="meta")
        first, end = self._own_rows(place.shape[0])
        own = torch.empty(end - first, *place.shape[1:], dtype=dtype, device=self.ranks.device)
        sharded = DTensor.from_local(
            own, self._mesh, [ShardedDim(0)], shape=whole.shape, stride=whole.stride()
        )
        return nn.Parameter(sharded, requires_grad=False)

    def _own_rows(self, rows: int) -> tuple[int, int]:
        size = -(-rows // self.ranks.world_size)
        first = min(self.ranks.rank * size, rows)
        return first, min(first + size, rows)

    def wrap_policy(self, model: PreTrainedModel, *, config: Config) -> "Fsdp2Policy":
        """AdamW over float32 shards, which are gathered in the model's own type."""
        kept = [(p, p.dtype) for p in model.parameters() if p.requires_grad]
        _replace_tensors(model, lambda t: t.float() if t.requires_grad else t)
        for parameter, dtype in kept:
            self._gathered_as[parameter] = dtype
        return Fsdp2Policy(model, config, self.ranks)

    def wrap_reference(self, trunk: nn.Module, *, offload: str, rows: int) -> SingleReference:
        """The frozen trunk in eval mode; everything is sharded again after each pass.

        Collectives of a pass: one all-gather for each layer that runs, and two for the embedding
        and the final norm.
        """
        trunk.requires_grad_(False)
        return SingleReference(trunk.eval())

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """A block with whole copies of these parameters. Collectives: one all-gather each."""
        yield [nn.Parameter(self._whole(p), requires_grad=False) for p in parameters]

    @torch.no_grad()
    def _whole(self, parameter: nn.Parameter) -> Tensor:
        dtype = self._gathered_as.get(parameter, parameter.dtype)
        own, rows = _local(parameter).to(self.ranks.device, dtype), parameter.shape[0]
        size = -(-rows // self.ranks.world_size)
        padded = own.new_zeros(size, *own.shape[1:])
        padded[: own.shape[0]] = own
        whole = own.new_empty(size * self.ranks.world_size, *own.shape[1:])
        dist.all_gather_into_tensor(whole, padded, group=self.ranks.dp_group)
        return whole[:rows]

    def first_not_finite(self, model: nn.Module) -> str | None:
        """Name of a parameter with a non-finite value in its shard, or None. No collectives."""
        return first_not_finite(model, self._shard_of)

    def fingerprint(self, model: nn.Module, adapters: Sequence[str] = ()) -> str:
        """Fingerprint from every rank's shard. Collectives: one SUM of 16 bytes a parameter."""
        return fingerprint(model, self._shard_of, self.ranks, adapters)

    def _shard_of(self, parameter: nn.Parameter) -> Shard:
        first, _ = self._own_rows(parameter.shape[0])
        return Shard(first * (parameter.numel() // parameter.shape[0]), _local(parameter).view(-1))


class Fsdp2Policy:
    """`engine.PolicyEngine` over modules that `fully_shard` has sharded."""

    def __init__(self, model: PreTrainedModel, config: Config, ranks: Ranks) -> None:
        self.module = model
        self._ranks = ranks
        self._max_grad_norm = config.optimizer.max_grad_norm
        whole = 4 * sum(p.numel() for p in model.parameters())
        self._reduces_each = whole > WHOLE_GRADIENT_BYTES
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            # The loss is divided by the global number of tokens already: sums, no averages.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        self._keep_head_whole(model)
        on_gpu = ranks.device.type == "cuda" and config.engine.offload_params == "none"
        self._optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
            fused=on_gpu,
        )

    def _keep_head_whole(self, model: PreTrainedModel) -> None:
        """The head's unit stays gathered from its forward to its backward."""
        embedding, head, base = _embedding_of(model), _head_of(model), model.base_model
        assert isinstance(embedding, FSDPModule)
        assert isinstance(base, FSDPModule)
        base.set_reshard_after_forward(False, recurse=False)
        if isinstance(head, FSDPModule):
            self._head = head
            embedding.set_unshard_in_backward(False)  # its gradient does not depend on its values
        else:
            self._head = embedding
            _share_weight(embedding, head)
        self._head.set_reshard_after_forward(False, recurse=False)

    def run(self, **inputs: Any) -> Any:
        """The model's output; all is sharded again after it where no backward follows."""
        output = self.module(**inputs)
        if not torch.is_grad_enabled():
            for unit in self._units:  # no backward will
                unit.reshard()
        return output

    @region(POLICY_FORWARD)
    def __call__(self, input_ids: Tensor, **positions: Tensor) -> Tensor:
        """Forward of one micro-batch under FSDP2's hooks."""
        return self.run(input_ids=input_ids, use_cache=False, **positions).logits

    @region(POLICY_BACKWARD)
    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`, in float32 across micro-batches.

        Collectives: one all-gather and one reduce-scatter per unit, the latter on the last
        micro-batch only (see `WHOLE_GRADIENT_BYTES`); the head is gathered once for all of them.
        """
        for unit in self._units:
            unit.set_requires_gradient_sync(is_last or self._reduces_each, recurse=False)
        self._head.set_reshard_after_backward(is_last, recurse=False)
        loss.backward()

    @region(OPTIMIZER)
    @torch.no_grad()
    def update(self, lr: float) -> Update:
        """Clips by global norm and steps; skipped by all ranks where the norm is not finite.

        Collectives: one SUM of 4 bytes. One host synchronisation.
        """
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        grads = [_local(p.grad) for p in trained if p.grad is not None]
        own = torch.nn.utils.get_total_norm(grads).to(self._ranks.device)
        norm = float(self._ranks.sum_(own.square()).sqrt())
        applied = norm < float("inf")
        if applied:
            if self._max_grad_norm > 0:
                scale = min(1.0, self._max_grad_norm / (norm + 1e-6))
                torch._foreach_mul_(grads, scale)  # type: ignore[attr-defined]
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Update(applied, norm)

    def save(self, folder: Path) -> None:
        """Weights and optimizer state through torch.distributed.checkpoint: shards of any ranks.

        Raises:
            CheckpointError: a rank could not write.
        Collectives: those of torch.distributed.checkpoint.
        """
        try:
            save_shared(self._state(), checkpoint_id=folder)
        except CheckpointException as err:
            raise CheckpointError(
                f"expected to write a checkpoint to {folder}, got: {reason_of(err)}: free disk "
                "space and run the same command again"
            ) from err

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, on this or another number of ranks.

        Raises:
            CheckpointError: there is no such checkpoint, or it is of another model.
        Collectives: those of torch.distributed.checkpoint.
        """
        state = self._state()
        try:
            with only_tensors():
                load_shared(state, storage_reader=MetadataReader(folder))
        except CheckpointException as err:
            raise CheckpointError(
                f"expected a checkpoint of engine fsdp2 in {folder}, got: {reason_of(err)}: remove "
                "it to resume from an earlier one"
            ) from err
        set_state_dict(
            self.module,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self._optimizer)
        return {"model": model, "optimizer": optimizer}


def _share_weight(embedding: nn.Module, head: nn.Module) -> None:
    """Lets a tied head run on the embedding's weight, which is whole then.

    FSDP2 exchanges the weight of the unit's own module; the head is in no unit.
    """
    sharded = head.weight

    def borrow(*_: object) -> None:
        head.weight = embedding.weight

    def give_back(*_: object) -> None:
        head.weight = sharded

    head.register_forward_pre_hook(borrow)
    head.register_forward_hook(give_back, always_call=True)


def _local(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def _replace_tensors(model: PreTrainedModel, change: Any) -> None:
    """Puts `change(tensor)` in the place of every parameter and buffer; tied ones stay tied."""
    model._apply(change)
    model.tie_weights()  # a unit registers a parameter anew, on its own modules only


def _offload_policy(offload: str) -> OffloadPolicy:
    if offload == "cpu":
        return CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    return OffloadPolicy()


def _embedding_of(model: PreTrainedModel) -> nn.Module:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    return embedding


def _head_of(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head


def _is_tied(model: PreTrainedModel) -> bool:
    return _embedding_of(model).weight is _head_of(model).weight


@contextmanager
def _whole_modules() -> Iterator[None]:
    """A block in which transformers builds models itself, though a policy may be under ZeRO-3."""
    before = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = before


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """A block in which modules put parameters on the meta device, and buffers where they say.

    Buffers that no file holds (rotary frequencies) are so what their module computes.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
