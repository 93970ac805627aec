"""The sections of the configuration, and the whole: frozen dataclasses, a sentence a field."""

import math
from dataclasses import dataclass, field
from typing import Any

from safereg_dist.config.checks import at_least, one_of, positive, within
from safereg_dist.config.risk import RiskConfig, check_signal
from safereg_dist.errors import ConfigError

OBJECTIVES = ("convex", "additive", "static", "none")
DIVERGENCES = ("kl_forward", "kl_reverse", "l2_logits")
SCHEDULES = ("step", "threshold", "linear", "clamp", "sigmoid")

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2602.17546: soft, linear in the risk of the batch, between 0.1 and 0.9.
    "paper": dict(
        objective="convex",
        divergence="kl_forward",
        schedule="linear",
        floor=0.1,
        ceiling=0.9,
        granularity="batch",
    ),
    # The authors' released script: break points on a judge's 1-5 scale instead of a line.
    "official": dict(
        objective="convex",
        divergence="kl_forward",
        schedule="clamp",
        floor=0.1,
        ceiling=0.9,
        granularity="batch",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceConfig:
    """The frozen model that risky rows are pulled toward."""

    model: str | None = None
    """Path or hub id; null = the weights of `model` before training."""
    offload: str = "none"
    """`none` or `cpu`: where the reference's shards rest between uses."""
    cache: str | None = None
    """Folder written by `safereg reference build`: no trunk runs on rows it holds; null = none."""
    rows_per_pass: int | None = None
    """Rows in one reference forward, >= 1; null = `train.micro_batch_size`. Bounds memory."""
    keep_bytes: int = 256 << 20
    """Bytes of reference states that may wait for their micro-batch, >= 0; one's always may."""
    balance: str = "auto"
    """Over ranks: `deal` risky rows evenly (needs a risk column), `exchange` them as they turn up,
    `none`, or `auto`: deal where risk is a column, else none."""

    def __post_init__(self) -> None:
        one_of("reference.offload", self.offload, ("none", "cpu"))
        one_of("reference.balance", self.balance, ("auto", "none", "deal", "exchange"))
        at_least("reference.keep_bytes", self.keep_bytes, 0)
        if self.rows_per_pass is not None:
            at_least("reference.rows_per_pass", self.rows_per_pass, 1)
        if self.cache is not None and self.balance == "exchange":
            raise ConfigError(
                "reference.balance=exchange moves rows to run the trunk on, but with "
                "reference.cache none runs: set balance=auto"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Rows to train on, as JSONL, CSV or a Hugging Face dataset id."""

    train: str
    """Training rows with `messages`, or `prompt` and `response`; optional `risk` and `id`."""
    validation: str | None = None
    """Rows for the validation loss; null = none."""
    anchor: str | None = None
    """Rows written by `safereg anchor build`; they carry only the divergence. null = none."""
    anchor_fraction: float = 0.05
    """Share of anchor rows among all rows, in (0, 1); read only with `anchor`."""
    max_length: int = 1024
    """Longest sequence in tokens, >= 2."""
    overlong: str = "drop"
    """`drop`, `truncate` or `error` for longer sequences; always counted and reported."""
    chat_template: str | None = None
    """File with a Jinja chat template; null = the tokenizer's own."""
    declared_poison: float = 0.0
    """Share of risky rows that you know of and train on on purpose, in [0, 1]."""

    def __post_init__(self) -> None:
        one_of("data.overlong", self.overlong, ("drop", "truncate", "error"))
        at_least("data.max_length", self.max_length, 2)
        within("data.declared_poison", self.declared_poison, 0.0, 1.0)
        if not 0 < self.anchor_fraction < 1:
            raise ConfigError(
                f"data.anchor_fraction must lie in (0, 1), got {self.anchor_fraction}: "
                "set data.anchor=null to train without anchor rows"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegularizerConfig:
    """How risk becomes a coefficient, and what the coefficient weighs."""

    objective: str = "convex"
    """`convex` (1-b)*CE + b*D, `additive` CE + b*D, `static` convex with b = ceiling, or `none`."""
    divergence: str = "kl_forward"
    """`kl_forward` KL(ref||policy), `kl_reverse` KL(policy||ref), or `l2_logits`."""
    schedule: str = "step"
    """`step`, `threshold`, `linear`, `clamp` or `sigmoid` (see `coefficient`)."""
    threshold: float | None = None
    """Risk at which regularisation sets in, in [0, 1]; null = the probe's own, else 0.5."""
    floor: float = 0.0
    """Coefficient of a harmless row, >= 0."""
    ceiling: float = 1.0
    """Coefficient of a risky row, >= floor; at most 1 unless the objective is `additive`."""
    slope: float = 12.0
    """Steepness of `sigmoid` per unit of risk, > 0."""
    ema: float = 0.0
    """Weight of the past in the batch risk, in [0, 1); only with granularity `batch`."""
    granularity: str = "sequence"
    """`sequence` (each row its own coefficient) or `batch` (one for a micro-batch on all ranks)."""
    preset: str | None = None
    """null, `paper` or `official`: fills the keys that are not given."""

    def __post_init__(self) -> None:
        one_of("regularizer.objective", self.objective, OBJECTIVES)
        one_of("regularizer.divergence", self.divergence, DIVERGENCES)
        one_of("regularizer.schedule", self.schedule, SCHEDULES)
        one_of("regularizer.granularity", self.granularity, ("sequence", "batch"))
        if self.threshold is not None:
            within("regularizer.threshold", self.threshold, 0.0, 1.0)
        at_least("regularizer.floor", self.floor, 0.0)
        at_least("regularizer.ceiling", self.ceiling, 0.0)
        if self.ceiling < self.floor:
            raise ConfigError(
                f"regularizer.ceiling {self.ceiling} is below regularizer.floor {self.floor}: "
                "raise the ceiling or lower the floor"
            )
        if self.objective in ("convex", "static") and self.ceiling > 1:
            raise ConfigError(
                f"regularizer.ceiling must be at most 1 with objective {self.objective}, got "
                f"{self.ceiling}: (1 - b) would be negative; use objective=additive for larger ones"
            )
        positive("regularizer.slope", self.slope)
        if not 0 <= self.ema < 1:
            raise ConfigError(f"regularizer.ema must lie in [0, 1), got {self.ema}")
        if self.ema > 0 and self.granularity != "batch":
            raise ConfigError(
                "regularizer.ema smooths the risk of a batch: set regularizer.granularity=batch, "
                "or ema=0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1.0e-5
    """Peak learning rate, > 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, >= 0."""
    warmup_ratio: float = 0.03
    """Share of all steps spent warming up linearly, in [0, 1]."""
    schedule: str = "cosine"
    """`cosine`, `linear` (both to `min_lr_ratio` * lr) or `constant` after the warm-up."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of `lr`, in [0, 1]."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 = no clipping."""
    beta1: float = 0.9
    """Decay of AdamW's first moment, in [0, 1)."""
    beta2: float = 0.999
    """Decay of AdamW's second moment, in [0, 1)."""
    eps: float = 1.0e-8
    """AdamW's epsilon, > 0."""

    def __post_init__(self) -> None:
        positive("optimizer.lr", self.lr)
        positive("optimizer.eps", self.eps)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        at_least("optimizer.weight_decay", self.weight_decay, 0.0)
        at_least("optimizer.max_grad_norm", self.max_grad_norm, 0.0)
        within("optimizer.warmup_ratio", self.warmup_ratio, 0.0, 1.0)
        within("optimizer.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length, batch and bookkeeping of the run."""

    steps: int | None = None
    """Optimizer steps, >= 1; 200 when neither steps nor epochs is given."""
    epochs: float | None = None
    """Passes over the training rows, > 0, instead of steps."""
    micro_batch_size: int = 4
    """Rows per rank and forward, >= 1."""
    grad_accum_steps: int = 1
    """Micro-batches per optimizer step, >= 1; the result does not depend on the split."""
    precision: str = "bf16"
    """`bf16` (float32 master weights in the optimizer) or `fp32`."""
    activation_checkpointing: bool = False
    """Recompute decoder layers in the backward pass to save memory."""
    seed: int = 0
    """Seed of data order, dropout and initial random states."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0 = none."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, >= 1."""
    eval_every: int = 0
    """Optimizer steps between validation losses; 0 = never."""
    head_bytes: int | None = None
    """Bytes for the head's logits and their gradient, >= 1 MiB; null = 3 GiB on a GPU."""
    chunk_tokens: int | None = None
    """Response tokens at a time in the head, >= 1, instead of `head_bytes`; null = by memory."""
    export_shard_bytes: int = 5_000_000_000
    """Largest safetensors shard of the exported model, in bytes."""

    def __post_init__(self) -> None:
        one_of("train.precision", self.precision, ("bf16", "fp32"))
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("train.steps and train.epochs are both set: keep one of them")
        if self.steps is not None:
            at_least("train.steps", self.steps, 1)
        if self.epochs is not None:
            positive("train.epochs", self.epochs)
        for name in ("micro_batch_size", "grad_accum_steps", "keep_checkpoints"):
            at_least(f"train.{name}", getattr(self, name), 1)
        if self.chunk_tokens is not None:
            at_least("train.chunk_tokens", self.chunk_tokens, 1)
        if self.head_bytes is not None:
            at_least("train.head_bytes", self.head_bytes, 1 << 20)
        for name in ("save_every", "eval_every", "seed"):
            at_least(f"train.{name}", getattr(self, name), 0)
        at_least("train.export_shard_bytes", self.export_shard_bytes, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What shards and steps the model."""

    name: str = "deepspeed"
    """`deepspeed` (ZeRO-3, any number of ranks) or `single` (plain torch, one process)."""
    zero_stage: int = 3
    """ZeRO stage of the deepspeed engine; 3 in this version."""
    offload_optimizer: str = "none"
    """`none` or `cpu`: where optimizer state and master weights live."""
    offload_params: str = "none"
    """`none` or `cpu`: where the policy's shards rest between uses."""
    hpz_partition_size: int = 1
    """Ranks that share a second copy of the policy's weights (ZeRO++ hpZ), e.g. the GPUs of a node:
    backward passes then gather inside the node. Must divide the number of ranks; 1 = off."""
    timeout_s: float = 1800.0
    """Seconds before a collective that some rank never joins is an error, > 0."""

    def __post_init__(self) -> None:
        if self.name == "fsdp2":
            raise ConfigError("engine.name=fsdp2 is not available yet: use deepspeed or single")
        one_of("engine.name", self.name, ("deepspeed", "single"))
        if self.zero_stage != 3:
            raise ConfigError(f"engine.zero_stage must be 3, got {self.zero_stage}")
        one_of("engine.offload_optimizer", self.offload_optimizer, ("none", "cpu"))
        one_of("engine.offload_params", self.offload_params, ("none", "cpu"))
        at_least("engine.hpz_partition_size", self.hpz_partition_size, 1)
        if self.name == "single" and self.hpz_partition_size != 1:
            raise ConfigError(
                f"engine.hpz_partition_size must be 1 with engine.name=single, got "
                f"{self.hpz_partition_size}: one process has nobody to share weights with"
            )
        positive("engine.timeout_s", self.timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One training run."""

    model: str
    """Path or hub id of the policy before training (safetensors)."""
    data: DataConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    risk: RiskConfig = field(default_factory=RiskConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: None = None
    """Not available in this version, must be null."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    output_dir: str = "runs/my-run"
    """Run folder: metrics, ledger, checkpoints, exported model."""
    profile: bool = False
    """Record FLOPs, bytes and seconds of every step, part by part, into the run folder; losses stay
    the same bits, steps take longer."""

    def __post_init__(self) -> None:
        if self.needs_risk:
            check_signal(self.risk, "risk")
            self._check_ceilings()
        if self.regularizer.objective == "none" and self.data.anchor is not None:
            raise ConfigError(
                "data.anchor needs a reference, but regularizer.objective=none never runs one: "
                "set data.anchor=null, or objective=static with ceiling=0 for anchors alone"
            )
        self._check_reference()
        if self.train.eval_every and self.data.validation is None:
            raise ConfigError("train.eval_every needs data.validation: set it, or eval_every=0")

    def _check_reference(self) -> None:
        rule, balance = self.regularizer, self.reference.balance
        if not self.needs_reference and (self.reference.cache or balance == "exchange"):
            raise ConfigError(
                "regularizer.objective=none never runs a reference: set reference.cache=null and "
                "reference.balance=auto"
            )
        if balance != "deal":
            return
        if not self.needs_risk or self.risk.estimator != "column":
            raise ConfigError(
                "reference.balance=deal needs the risk of all rows beforehand (risk.estimator="
                f"column, objective convex or additive), got estimator {self.risk.estimator} and "
                f"objective {rule.objective}: write it with `safereg score`, or use exchange"
            )
        if rule.granularity == "batch":
            raise ConfigError(
                "reference.balance=deal needs regularizer.granularity=sequence: with batch a row's "
                "coefficient hangs on the rows beside it; set balance=none or exchange"
            )

    def _check_ceilings(self) -> None:
        rule = self.regularizer
        for part in self.risk.parts:
            if part.ceiling is None:
                continue
            where = f"risk.parts[{part.category}].ceiling"
            if rule.granularity == "batch":
                raise ConfigError(f"{where} needs regularizer.granularity=sequence, not batch")
            highest = math.inf if rule.objective == "additive" else 1.0
            within(where, part.ceiling, rule.floor, highest)

    @property
    def needs_reference(self) -> bool:
        """True unless the objective is plain supervised fine-tuning."""
        return self.regularizer.objective != "none"

    @property
    def needs_risk(self) -> bool:
        """True where the coefficient depends on the row's risk."""
        return self.regularizer.objective in ("convex", "additive")
