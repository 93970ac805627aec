"""The single-process backend: plain torch, no launcher, no process group.

Useful for small models and for debugging; the arithmetic is the same as on many ranks.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from safereg_dist.config import Config
from safereg_dist.errors import CheckpointError, ConfigError, GroupError, reason_of
from safereg_dist.models.architecture import read_architecture
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Adapt, Update
from safereg_dist.parallel.optimizer import parameter_groups
from safereg_dist.parallel.pickles import load_tensors
from safereg_dist.parallel.shards import (
    StoredParameter,
    dtype_of,
    fill_adapters,
    match_names,
    read_flat_slices,
    stored_head,
    weight_files,
    whole_shard,
)
from safereg_dist.regions import OPTIMIZER, POLICY_BACKWARD, POLICY_FORWARD, region
from safereg_dist.screen.progress import bars_of_transformers
from safereg_dist.types import Head

_STATE_FILE = "single.pt"


def single_ranks() -> Ranks:
    """This process alone.

    Raises:
        GroupError: a launcher started several processes, which this engine cannot coordinate.
    """
    import os

    from safereg_dist.parallel.launchers import adopt_launcher

    adopt_launcher()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GroupError(
            f"engine.name=single expects one process, the launcher started "
            f"{os.environ['WORLD_SIZE']}: set engine.name=deepspeed"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Ranks(rank=0, world_size=1, local_rank=0, device=device, dp_group=None)


class SingleBackend:
    """Whole models in one process (see `engine.Backend` for the contract of each method)."""

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
        """The model, whole, on this process's device; there is nothing to offload or to share."""
        read_architecture(folder)
        files, packed = weight_files(folder), self._packed(quantize, precision)
        model: Any
        try:
            with bars_of_transformers(shown=self.ranks.is_main):
                model = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=dtype_of(precision),
                    trust_remote_code=False,
                    use_safetensors=True,
                    **packed,
                )
        except Exception as err:  # sizes of all kinds, files of all kinds
            raise ConfigError(
                f"the model in {folder} cannot be loaded: {reason_of(err)}: check its files"
            ) from err
        if not packed:  # else a weight's shape is not its file's
            match_names(model, files, folder)
        if adapt is not None:
            with self.ranks.together():
                fill_adapters(model, adapt(model), whole_shard)
        return model if packed else model.to(self.ranks.device)

    def _packed(self, quantize: str, precision: str) -> dict[str, Any]:
        """What transformers must know to keep weights in fewer bits, on this process's device."""
        kinds = {
            "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "int8": {"load_in_8bit": True},
        }
        if quantize == "none":
            return {}
        how = {**kinds[quantize], "bnb_4bit_compute_dtype": dtype_of(precision)}
        return {
            "quantization_config": BitsAndBytesConfig(**how),
            "device_map": {"": self.ranks.device},
        }

    def load_head(self, folder: Path, *, precision: str) -> Head:
        """The frozen head, whole, on this process's device."""
        stored = stored_head(folder)

        def whole(place: StoredParameter | None) -> nn.Parameter | None:
            if place is None:
                return None
            [flat] = read_flat_slices([(place, 0, math.prod(place.shape))])
            values = flat.reshape(place.shape).to(self.ranks.device, dtype_of(precision), copy=True)
            return nn.Parameter(values, requires_grad=False)

        return Head(whole(stored.weight), whole(stored.bias), stored.softcap, stored.scale)

    def wrap_policy(self, model: PreTrainedModel, *, config: Config) -> "SinglePolicy":
        """AdamW over float32 master weights."""
        return SinglePolicy(model, config)

    def wrap_reference(self, trunk: nn.Module, *, offload: str, rows: int) -> "SingleReference":
        """The frozen trunk in eval mode."""
        trunk.requires_grad_(False)
        return SingleReference(trunk.to(self.ranks.device).eval())

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """The parameters: nothing to gather."""
        yield list(parameters)

    def first_not_finite(self, model: nn.Module) -> str | None:
        """Name of a parameter that holds a value that is not finite."""
        found = (name for name, p in model.named_parameters() if not p.detach().isfinite().all())
        return next(found, None)

    def fingerprint(self, model: nn.Module, adapters: Sequence[str] = ()) -> str:
        """Fingerprint of the whole model."""
        return model_fingerprint(model, adapters)


class SinglePolicy:
    """`engine.PolicyEngine` in plain torch."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.module = self.run = model
        self._max_grad_norm = config.optimizer.max_grad_norm
        groups = parameter_groups(model, config.optimizer.weight_decay)
        self._trained = [p for group in groups for p in group["params"]]
        for group in groups:
            group["params"] = [p.detach().float().clone() for p in group["params"]]
        self._masters = [p for group in groups for p in group["params"]]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
        )

    @region(POLICY_FORWARD)
    def __call__(self, input_ids: Tensor, **positions: Tensor) -> Tensor:
        """Forward of one micro-batch."""
        return self.module(input_ids=input_ids, use_cache=False, **positions).logits

    @region(POLICY_BACKWARD)
    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`, in float32 across micro-batches."""
        loss.backward()
        for master, trained in zip(self._masters, self._trained, strict=True):
            if trained.grad is not None:
                grad = trained.grad.float()
                master.grad = grad if master.grad is None else master.grad + grad
                trained.grad = None

    @region(OPTIMIZER)
    @torch.no_grad()
    def update(self, lr: float) -> Update:
        """Clips by global norm and steps; skipped where the norm is not finite."""
        limit = self._max_grad_norm if self._max_grad_norm > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self._masters, limit))
        applied = norm < float("inf")
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            for master, trained in zip(self._masters, self._trained, strict=True):
                trained.copy_(master)
        self._optimizer.zero_grad(set_to_none=True)
        return Update(applied, norm)

    def save(self, folder: Path) -> None:
        """Masters and optimizer state through torch.save (tensors and plain values)."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"masters": self._masters, "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / _STATE_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it holds more than tensors and values.
        """
        path = folder / _STATE_FILE
        if not path.is_file():
            raise CheckpointError(f"expected {_STATE_FILE} in {folder}, found none")
        state = load_tensors(path, map_location=self._masters[0].device)
        for master, trained, saved in zip(
            self._masters, self._trained, state["masters"], strict=True
        ):
            master.copy_(saved)
            trained.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])


class SingleReference:
    """`engine.ReferenceEngine` in plain torch."""

    def __init__(self, trunk: nn.Module) -> None:
        self.module = trunk

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """[B, S, H] last hidden states."""
        return self.module(input_ids)

    @torch.no_grad()
    def prefix(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after `num_layers` layers."""
        return self.module(input_ids, num_layers=num_layers)
