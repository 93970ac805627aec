"""The adapters of a LoRA run: what is trained beside weights that are frozen."""

from safereg_dist.errors import ConfigError
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape


def adapter_numels(shape: ModelShape, settings: Settings) -> tuple[int, ...]:
    """Elements of each adapter's two matrices, rank x in and out x rank; none without LoRA.

    Raises:
        ConfigError: targets that the model does not have.
    """
    if not settings.lora_rank:
        return ()
    linear = {module.path: module.linear for module in shape.modules if module.linear is not None}
    ends = tuple(f".{name}" for name in settings.lora_targets)
    chosen = [sizes for path, sizes in linear.items() if not ends or f".{path}".endswith(ends)]
    if not chosen:
        names = sorted({path.rpartition(".")[2] for path in linear})
        raise ConfigError(
            f"lora.targets={list(settings.lora_targets)} are no linear layers of a "
            f"{shape.model_type}: it has {', '.join(names) or 'none'}"
        )
    return tuple(settings.lora_rank * size for sizes in chosen for size in sizes)


def trained_numels(shape: ModelShape, settings: Settings) -> tuple[int, ...]:
    """Elements of each parameter that is trained: adapters, else all."""
    everything = tuple(n for module in shape.modules for n in module.numels)
    return adapter_numels(shape, settings) or everything


def padded_shard(numels: tuple[int, ...], settings: Settings) -> float:
    """Elements of one rank's shard of parameters, each padded to whole shards."""
    return sum(-(-n // settings.world_size) for n in numels)
