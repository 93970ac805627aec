"""What a Trainer must be for the step to work inside it; refused at the start, by all ranks."""

import os
from typing import Any

from safereg_dist.errors import ConfigError, GroupError
from safereg_dist.parallel.distributed import current_ranks


def check_trainer(trainer: Any) -> None:
    """Raises ConfigError or GroupError where the step cannot work in this Trainer."""
    _check_ranks(trainer)
    _check_loss(trainer)
    _check_parallelism(trainer)


def _check_ranks(trainer: Any) -> None:
    launched, known = int(os.environ.get("WORLD_SIZE", "1")), trainer.accelerator.num_processes
    joined = current_ranks().world_size
    if launched > 1 and (known == 1 or joined != known):
        raise GroupError(
            f"the launcher started {launched} processes, but accelerate trains with {known}: every "
            "process would train alone on the same rows; check that accelerate sees the GPUs (on "
            "CPUs it knows neither DeepSpeed nor FSDP)"
        )
    if getattr(trainer.args, "n_gpu", 1) > 1:
        raise ConfigError(
            f"one process drives {trainer.args.n_gpu} GPUs (DataParallel), whose copies of the "
            "model have no head of their own: start one process a GPU, with torchrun or accelerate"
        )


def _check_loss(trainer: Any) -> None:
    args = trainer.args
    # TRL puts a text there where transformers (before 5.19) would scale the loss by itself.
    if callable(getattr(trainer, "compute_loss_func", None)):
        raise ConfigError(
            "compute_loss_func would be given the loss in place of logits: leave it out, the loss "
            "is cross-entropy and divergence (regularizer.objective)"
        )
    if getattr(args, "label_smoothing_factor", 0):
        raise ConfigError(
            f"label_smoothing_factor={args.label_smoothing_factor} needs logits, which are never "
            "made: set it to 0"
        )
    loss_type = getattr(args, "loss_type", None)
    if loss_type not in (None, "nll", "chunked_nll"):
        raise ConfigError(
            f"loss_type={loss_type} is another loss than the one that is regularised: set "
            "loss_type=nll"
        )


def _check_parallelism(trainer: Any) -> None:
    for name, what in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence (Ulysses)")):
        size = getattr(trainer, f"get_{name}_size", lambda: 1)()
        if size > 1:
            raise ConfigError(
                f"{what} parallelism of size {size} splits rows or the head between ranks, which "
                "is not supported under the Trainer: set it to 1"
            )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ConfigError(
            "FSDP version 1 keeps the head's weights in a flat parameter: set fsdp_version=2"
        )
