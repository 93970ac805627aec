"""What a run will read, write and send, from its configuration and the planner."""

from dataclasses import dataclass
from pathlib import Path

from safereg_dist.config import Config
from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import GPUS, find_gpu, rates_of_device
from safereg_dist.plan.adapters import trained_numels
from safereg_dist.plan.memory import CHECKPOINT_BYTES
from safereg_dist.plan.named_shapes import shape_name
from safereg_dist.plan.plan import Costs, arm_costs
from safereg_dist.plan.settings import Settings, settings_of
from safereg_dist.plan.shape import ModelShape, read_shape
from safereg_dist.screen.table import gigabytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The needs of a run; None where the planner cannot say them."""

    packages: tuple[str, ...]
    """Of extras (`models.extras`)."""
    paths: list[str]
    hub_model: str | None
    """The id of a model that is no folder here, so that nobody can look whether it is there."""
    endpoints: list[str]
    checkpoint_bytes: int | None
    disk_bytes: int
    disk_text: str
    step_seconds: float | None
    """Of matrix products, on the slowest rank."""
    inside_bytes: float | None
    between_bytes: float | None

    def moved_bytes(self, *, between_hosts: bool) -> float | None:
        """Bytes that a rank receives in a step over the links that were measured."""
        return self.between_bytes if between_hosts else self.inside_bytes


def work_of(config: Config, *, world_size: int, per_host: int, gpu: str) -> Work:
    """The needs of a run on so many ranks; `gpu` is the driver's name of one, or empty."""
    parts = config.risk.parts or (config.risk,)
    used = parts if config.needs_risk else ()
    critics = [part.critic for part in used if part.estimator == "critic"]
    paths = [config.reference.model, config.reference.cache, config.risk.override]
    paths += [part.path for part in used] + [critic.local for critic in critics]
    paths += [*_sources(config.data.train), config.data.validation, config.data.anchor]
    paths += [config.data.chat_template, None if config.eval is None else config.eval.canary]
    model = Path(config.model)
    is_hub_id = not model.is_dir() and not model.is_absolute()  # `./name` was made absolute
    shape = None
    if not is_hub_id:
        paths.append(config.model)
    if model.is_dir() or shape_name(config.model) is not None:
        try:
            shape = read_shape(config.model)
        except ConfigError:
            pass  # a type that the planner does not know trains all the same
    costs = None
    checkpoint = export = None
    if shape is not None:
        trained = _trained(config, shape)
        checkpoint = CHECKPOINT_BYTES * trained
        export = (2 if config.train.precision == "bf16" else 4) * shape.parameters
        costs = _costs(config, shape, world_size, per_host, gpu)
    kept = config.train.keep_checkpoints + 1 if config.train.save_every else 1
    needs = {"deepspeed": config.engine.name == "deepspeed", "peft": config.lora is not None}
    return Work(
        packages=("datasets", *(name for name, is_needed in needs.items() if is_needed)),
        paths=[path for path in paths if path is not None and ("/" in path or Path(path).exists())],
        hub_model=config.model if is_hub_id else None,
        endpoints=[critic.endpoint for critic in critics if critic.endpoint is not None],
        checkpoint_bytes=checkpoint,
        disk_bytes=kept * (checkpoint or 0) + (export or 0),
        disk_text=f"{kept} checkpoints of {gigabytes(checkpoint or 0)} and the export",
        step_seconds=None if costs is None else _products(costs, world_size, gpu),
        inside_bytes=None if costs is None else sum(t.total for t in costs.traffic.values()),
        between_bytes=None if costs is None else sum(t.between for t in costs.traffic.values()),
    )


def _trained(config: Config, shape: ModelShape) -> int:
    lora = config.lora
    if lora is None:
        return shape.parameters
    settings = Settings(world_size=1, lora_rank=lora.rank, lora_targets=tuple(lora.targets))
    try:
        return sum(trained_numels(shape, settings))
    except ConfigError:  # layers of a kind that the planner does not know
        return shape.parameters // 50


def _sources(train: object) -> list[str]:
    """The files of `data.train`: one, or several with their shares."""
    if isinstance(train, str):
        return [train]
    parts = train if isinstance(train, list | tuple) else ()
    return [part if isinstance(part, str) else part.path for part in parts]


def _costs(config: Config, shape, world_size: int, per_host: int, gpu: str) -> Costs | None:
    try:
        settings = settings_of(config, world_size=world_size, gpus_per_node=per_host)
        return arm_costs(shape, settings, _nearest(gpu))
    except ConfigError:
        return None


def _nearest(name: str):
    try:
        return find_gpu(name)
    except ConfigError:
        return GPUS[0]  # only FLOPs and bytes are read, which are the same on all


def _products(costs: Costs, world_size: int, gpu: str) -> float:
    rates = rates_of_device(gpu or None, spans_nodes=False)
    return costs.total_flops / (rates.flops_per_s * world_size)
