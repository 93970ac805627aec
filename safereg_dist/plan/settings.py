"""The settings of a plan: ranks, batch, risk and offloading. Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safereg_dist.config import Config
from safereg_dist.config.checks import one_of, within
from safereg_dist.config.sections import KEEP_BYTES
from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import MFU
from safereg_dist.parallel.zero_config import MAX_LIVE_PARAMETERS, MAX_REUSE_DISTANCE

ARMS = ("sft", "routed", "stored", "always_on")
"""Plain fine-tuning; the reference on risky rows; its states from a store; on every row."""
ENGINES = ("deepspeed", "megatron")
_OPTIONS = {"hpz": "hpz_partition_size"}
_OF_DEEPSPEED = {
    **{"hpz": 1, "balance": "none", "probe_depth": 0.0, "rows_per_pass": None, "lora_rank": 0},
    **{name: "none" for name in ("offload_params", "offload_optimizer", "offload_reference")},
}
_OF_MEGATRON = {
    **{"tensor_parallel": 1, "pipeline_parallel": 1, "context_parallel": 1},
    **{"virtual_pipeline": 1, "ends_as_layers": False},
    **{"sequence_parallel": True, "distributed_optimizer": True, "vocab_multiple": 128},
    "reference_in_bubble": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One training run, as far as its cost depends on it."""

    world_size: int
    """GPUs, >= 1."""
    gpus_per_node: int = 8
    """GPUs that NVLink or PCIe joins, >= 1."""
    seq_length: int = 1024
    """Tokens of a row, all rows alike, >= 2."""
    response_share: float = 0.5
    """Share of a row's tokens that are trained on, in [0, 1]."""
    micro_batch: int = 4
    """Rows per rank and forward, >= 1."""
    grad_accum: int = 1
    """Micro-batches of a data-parallel replica per optimizer step, >= 1."""
    risky_fraction: float = 0.1
    """Share of rows with a coefficient above 0, anchor rows among them, in [0, 1]."""
    arm: str = "routed"
    """One of `ARMS`."""
    balance: str = "none"
    """`none`: rows fall on ranks by chance; `deal`: dealt evenly over ranks and steps."""
    probe_depth: float = 0.0
    """k / L of a reference-side probe, in [0, 1]; 0 = a column or a policy-side probe."""
    zero_stage: int = 3
    """3 in this version."""
    hpz: int = 1
    """`engine.hpz_partition_size`: ranks that share a second shard of the policy, >= 1."""
    offload_params: str = "none"
    offload_optimizer: str = "none"
    offload_reference: str = "none"
    """`none` or `cpu`."""
    activation_checkpointing: bool = False
    """Decoder layers are run again in the backward pass (Megatron: full recompute)."""
    precision: str = "bf16"
    """`bf16` or `fp32`."""
    engine: str = "deepspeed"
    """One of `ENGINES`; what follows, up to the head's, is Megatron's."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    """Ranks that share each layer, and stages of layers, >= 1."""
    context_parallel: int = 1
    """Ranks that share each row's tokens, >= 1."""
    virtual_pipeline: int = 1
    """Chunks of layers on each stage, >= 1: above 1 the interleaved schedule."""
    ends_as_layers: bool = False
    """Embedding and loss each take a layer's place on the first and the last stage."""
    sequence_parallel: bool = True
    """Between its products a layer's states are spread over the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Master weights and moments are spread over the data- and context-parallel ranks."""
    vocab_multiple: int = 128
    """The vocabulary is padded to a multiple of this times `tensor_parallel`, >= 1."""
    reference_in_bubble: bool = False
    """The next step's reference forwards run in a step's idle slots (see `plan.pipeline`)."""
    head_bytes: int | None = None
    """`train.head_bytes`; None = what the head takes of itself."""
    chunk_tokens: int | None = None
    """`train.chunk_tokens`."""
    rows_per_pass: int | None = None
    """`reference.rows_per_pass`; None = `micro_batch`."""
    keep_bytes: int = KEEP_BYTES
    """`reference.keep_bytes`."""
    reuse_distance: int = MAX_REUSE_DISTANCE
    """DeepSpeed's `stage3_max_reuse_distance`, in parameters, >= 1; this is its default."""
    max_live_parameters: int = MAX_LIVE_PARAMETERS
    """Parameters beside the head's beyond which nothing is prefetched (see `zero_config`)."""
    lora_rank: int = 0
    """`lora.rank`; 0 = all weights are trained."""
    lora_targets: tuple[str, ...] = ()
    """`lora.targets`; empty = all linear layers but the head."""
    copies_reference: bool = False
    """Beside adapters the reference is a model of its own, not the policy with them off."""
    mfu: float = MFU
    """Share of the GPU's peak that matrix products reach, in (0, 1]."""

    def __post_init__(self) -> None:
        for name in (
            *("world_size", "gpus_per_node", "micro_batch", "grad_accum", "hpz"),
            *("tensor_parallel", "pipeline_parallel", "context_parallel", "virtual_pipeline"),
            *("vocab_multiple", "reuse_distance"),
        ):
            _at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        for name in ("chunk_tokens", "head_bytes"):
            if getattr(self, name) is not None:
                _at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        if self.rows_per_pass is not None:
            _at_least("--rows-per-pass", self.rows_per_pass, 1)
        _at_least("--seq-length", self.seq_length, 2)
        _at_least("--lora-rank", self.lora_rank, 0)
        for name in ("response_share", "risky_fraction", "probe_depth", "mfu"):
            within(f"--{name.replace('_', '-')}", getattr(self, name), 0.0, 1.0)
        if not self.mfu:
            raise ConfigError("--mfu must be above 0: with 0 no step would ever end")
        one_of("arm", self.arm, ARMS)
        one_of("--engine", self.engine, ENGINES)
        one_of("--balance", self.balance, ("none", "deal"))
        one_of("--precision", self.precision, ("bf16", "fp32"))
        for name in ("offload_params", "offload_optimizer", "offload_reference"):
            one_of(f"--{name.replace('_', '-')}", getattr(self, name), ("none", "cpu"))
        if self.zero_stage != 3:
            raise ConfigError(
                f"--zero-stage must be 3 in this version, got {self.zero_stage}: plan with 3 "
                "(engine.zero_stage=3), which needs less memory and moves more bytes"
            )
        self._check_engine()
        self._check_division()

    def _check_engine(self) -> None:
        """Refuses options of the other engine, which would be planned as if they were not there."""
        other, foreign = ("megatron", _OF_MEGATRON)
        if self.engine == "megatron":
            other, foreign = ("deepspeed", _OF_DEEPSPEED)
        for name, plain in foreign.items():
            if getattr(self, name) != plain:
                option = "--no-" if plain is True else "--"
                option += _OPTIONS.get(name, name).replace("_", "-")
                raise ConfigError(
                    f"--engine {self.engine} plans without {option}, got {getattr(self, name)!r}: "
                    f"leave the option out, or choose --engine {other}"
                )
        if self.engine == "megatron" and self.arm == "stored":
            raise ConfigError(
                "--engine megatron has no stored reference in its plan (training has one: "
                "reference.cache): leave --stored-reference out"
            )
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            raise ConfigError(
                f"--virtual-pipeline {self.virtual_pipeline} expects --pipeline-parallel of at "
                "least 2, got 1: leave it out"
            )

    def _check_division(self) -> None:
        parallel = self.model_parallel
        if self.world_size % parallel:
            context = f" x --context-parallel {self.context_parallel}"
            raise ConfigError(
                f"--world-size {self.world_size} is not a multiple of --tensor-parallel "
                f"{self.tensor_parallel} x --pipeline-parallel {self.pipeline_parallel}"
                f"{context if self.context_parallel > 1 else ''}: "
                f"the nearest are {near(self.world_size, parallel)}"
            )
        if self.data_parallel % self.hpz:
            raise ConfigError(
                f"--hpz-partition-size {self.hpz} does not divide the {self.data_parallel} "
                f"data-parallel ranks: choose one of {divisors(self.data_parallel)}"
            )
        node = self.gpus_per_node
        if self.world_size > node and self.world_size % node:
            raise ConfigError(
                f"--world-size {self.world_size} is not a multiple of --gpus-per-node {node}: "
                f"the nearest are {near(self.world_size, node)}"
            )
        if node % self.tensor_parallel and self.tensor_parallel % node:
            raise ConfigError(
                f"--tensor-parallel {self.tensor_parallel} does not divide --gpus-per-node {node}: "
                f"choose one of {divisors(node)}"
            )

    @property
    def has_adapters_off(self) -> bool:
        """True if the reference is the policy itself; a stored one's head is its own."""
        own_trunk = self.arm in ("routed", "always_on") and not self.copies_reference
        return self.lora_rank > 0 and own_trunk

    @property
    def data_parallel(self) -> int:
        """Ranks that see different rows; ZeRO-3 shards over these."""
        return self.world_size // self.model_parallel

    @property
    def model_parallel(self) -> int:
        """Ranks that see the same rows."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def window_rows(self) -> int:
        """Rows of one data-parallel rank in an optimizer step."""
        return self.micro_batch * self.grad_accum

    @property
    def response_tokens(self) -> float:
        """Trained tokens of a row."""
        return self.response_share * self.seq_length

    @property
    def head_bytes_held(self) -> int:
        """Bytes of the head's logits and their gradient."""
        from safereg_kernels.budget import HEAD_BYTES  # its package loads torch

        return self.head_bytes or HEAD_BYTES["cuda"]

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter."""
        return 2 if self.precision == "bf16" else 4


def settings_of(config: Config, **given: Any) -> Settings:
    """The settings of a configured run; `given` win over the configuration's, and add to them.

    Raises:
        ConfigError: a run that cannot be planned, as one with ZeRO-1 or 2.
    """
    return Settings(**values_of(config, given))


def default_of(name: str) -> Any:
    """The default of a field of `Settings`."""
    return Settings.__dataclass_fields__[name].default


def values_of(config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `Settings` takes of a configuration and of `given`, which win and add to it.

    Of a run that is to be planned for Megatron, what DeepSpeed alone knows is left out.

    Raises:
        ConfigError: a stored reference of a run without any.
    """
    arm = "sft"
    if config.data.anchor is not None and config.needs_reference:
        of_data = given.get("risky_fraction", default_of("risky_fraction"))
        anchors = config.data.anchor_fraction
        given = {**given, "risky_fraction": anchors + (1 - anchors) * of_data}
    if not config.needs_reference and given.get("arm") == "stored":
        raise ConfigError(
            f"regularizer.objective={config.regularizer.objective} runs no reference: leave "
            "--stored-reference out"
        )
    if config.needs_reference:
        arm = "routed" if config.reference.cache is None else "stored"
    own: dict[str, Any] = dict(
        arm=arm,
        balance="deal" if config.deals_rows else "none",
        seq_length=config.data.max_length,
        micro_batch=config.train.micro_batch_size,
        grad_accum=config.train.grad_accum_steps,
        activation_checkpointing=config.train.activation_checkpointing,
        precision=config.train.precision,
        head_bytes=config.train.head_bytes,
        chunk_tokens=config.train.chunk_tokens,
        zero_stage=config.engine.zero_stage,
        hpz=config.engine.hpz_partition_size,
        offload_params=config.engine.offload_params,
        offload_optimizer=config.engine.offload_optimizer,
        offload_reference=config.reference.offload,
        rows_per_pass=config.reference.rows_per_pass,
        keep_bytes=config.reference.keep_bytes,
    )
    if config.lora is not None:
        reference = config.reference
        is_off = reference.engine == "auto" and reference.model is None
        own |= {
            **{"lora_rank": config.lora.rank, "lora_targets": tuple(config.lora.targets)},
            "copies_reference": not is_off and reference.engine != "adapters_off",
        }
    if given.get("engine") == "megatron":
        foreign = {*_OF_DEEPSPEED, "zero_stage", "lora_targets", "copies_reference"}
        own = {name: value for name, value in own.items() if name not in foreign}
        own["arm"] = "routed" if arm == "stored" else arm
    return {**own, **given}


def with_rows(settings: Settings, rows: int | None) -> Settings:
    """The settings with as many micro-batches as `rows` of a step need; None leaves them.

    Raises:
        ConfigError: no whole number of micro-batches.
    """
    least = settings.data_parallel * settings.micro_batch
    if rows is None:
        return settings
    if rows < 1 or rows % least:
        raise ConfigError(
            f"--rows-per-step {rows} is not a multiple of {least} (--micro-batch "
            f"{settings.micro_batch} on {settings.data_parallel} data-parallel GPUs): the nearest "
            f"are {near(rows, least)}; or change --micro-batch"
        )
    return replace(settings, grad_accum=rows // least)


def near(value: int, step: int) -> str:
    """The multiples of `step` next to a value, as text."""
    low = value // step * step
    return " and ".join(str(n) for n in (low, low + step) if n > 0)


def divisors(value: int) -> str:
    """The divisors of a value, as text."""
    return ", ".join(str(n) for n in range(1, value + 1) if value % n == 0)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")
