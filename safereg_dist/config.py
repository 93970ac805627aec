"""The configuration: what a run is, as frozen dataclasses with one sentence under each field.

`load_config` reads YAML, applies `key.sub=value` overrides, fills a preset, and refuses what it
does not know. Everything else in the package receives these objects and never looks at a raw dict.
"""

import difflib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from safereg_dist.errors import ConfigError

OBJECTIVES = ("convex", "additive", "static", "none")
DIVERGENCES = ("kl_forward", "kl_reverse", "l2_logits")
SCHEDULES = ("step", "threshold", "linear", "clamp", "sigmoid")
ESTIMATORS = ("probe", "column", "none")

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
    """Stored reference hidden states; not available in this version, must be null."""
    rows_per_pass: int | None = None
    """Rows in one reference forward, >= 1; null = `train.micro_batch_size`. Bounds memory."""

    def __post_init__(self) -> None:
        _one_of("reference.offload", self.offload, ("none", "cpu"))
        if self.cache is not None:
            raise ConfigError("reference.cache must be null: stored states are not available yet")
        if self.rows_per_pass is not None:
            _at_least("reference.rows_per_pass", self.rows_per_pass, 1)


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

    def __post_init__(self) -> None:
        _one_of("data.overlong", self.overlong, ("drop", "truncate", "error"))
        _at_least("data.max_length", self.max_length, 2)
        if not 0 < self.anchor_fraction < 1:
            raise ConfigError(
                f"data.anchor_fraction must lie in (0, 1), got {self.anchor_fraction}: "
                "set data.anchor=null to train without anchor rows"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskConfig:
    """Where each row's risk in [0, 1] comes from."""

    estimator: str = "probe"
    """`probe` (activation probe), `column` (field `risk` of the data) or `none` (risk 0)."""
    path: str | None = None
    """Folder written by `safereg probe fit`; required by `probe`."""
    source: str = "reference"
    """`reference` (never drifts; cached) or `policy` (free, but drifts) hidden states."""
    force: bool = False
    """Accept a probe that was fitted on another model's weights."""

    def __post_init__(self) -> None:
        _one_of("risk.estimator", self.estimator, ESTIMATORS)
        _one_of("risk.source", self.source, ("reference", "policy"))


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
        _one_of("regularizer.objective", self.objective, OBJECTIVES)
        _one_of("regularizer.divergence", self.divergence, DIVERGENCES)
        _one_of("regularizer.schedule", self.schedule, SCHEDULES)
        _one_of("regularizer.granularity", self.granularity, ("sequence", "batch"))
        if self.threshold is not None:
            _within("regularizer.threshold", self.threshold, 0.0, 1.0)
        _at_least("regularizer.floor", self.floor, 0.0)
        _at_least("regularizer.ceiling", self.ceiling, 0.0)
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
        _positive("regularizer.slope", self.slope)
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
        _positive("optimizer.lr", self.lr)
        _positive("optimizer.eps", self.eps)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        _one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        _at_least("optimizer.weight_decay", self.weight_decay, 0.0)
        _at_least("optimizer.max_grad_norm", self.max_grad_norm, 0.0)
        _within("optimizer.warmup_ratio", self.warmup_ratio, 0.0, 1.0)
        _within("optimizer.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)


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
    chunk_tokens: int = 1024
    """Response tokens per chunk of the head, >= 1: bounds memory, not the result."""
    export_shard_bytes: int = 5_000_000_000
    """Largest safetensors shard of the exported model, in bytes."""

    def __post_init__(self) -> None:
        _one_of("train.precision", self.precision, ("bf16", "fp32"))
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("train.steps and train.epochs are both set: keep one of them")
        if self.steps is not None:
            _at_least("train.steps", self.steps, 1)
        if self.epochs is not None:
            _positive("train.epochs", self.epochs)
        for name in ("micro_batch_size", "grad_accum_steps", "keep_checkpoints", "chunk_tokens"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("save_every", "eval_every", "seed"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        _at_least("train.export_shard_bytes", self.export_shard_bytes, 1)


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
    timeout_s: float = 1800.0
    """Seconds before a collective that some rank never joins is an error, > 0."""

    def __post_init__(self) -> None:
        if self.name == "fsdp2":
            raise ConfigError("engine.name=fsdp2 is not available yet: use deepspeed or single")
        _one_of("engine.name", self.name, ("deepspeed", "single"))
        if self.zero_stage != 3:
            raise ConfigError(f"engine.zero_stage must be 3, got {self.zero_stage}")
        _one_of("engine.offload_optimizer", self.offload_optimizer, ("none", "cpu"))
        _one_of("engine.offload_params", self.offload_params, ("none", "cpu"))
        _positive("engine.timeout_s", self.timeout_s)


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

    def __post_init__(self) -> None:
        uses_risk = self.regularizer.objective in ("convex", "additive")
        if uses_risk and self.risk.estimator == "probe" and self.risk.path is None:
            raise ConfigError(
                "risk.estimator=probe needs risk.path, a folder written by `safereg probe fit`: "
                "set risk.path, or risk.estimator=column"
            )
        if self.regularizer.objective == "none" and self.data.anchor is not None:
            raise ConfigError(
                "data.anchor needs a reference, but regularizer.objective=none never runs one: "
                "set data.anchor=null, or objective=static with ceiling=0 for anchors alone"
            )
        if self.train.eval_every and self.data.validation is None:
            raise ConfigError("train.eval_every needs data.validation: set it, or eval_every=0")

    @property
    def needs_reference(self) -> bool:
        """True unless the objective is plain supervised fine-tuning."""
        return self.regularizer.objective != "none"

    @property
    def needs_risk(self) -> bool:
        """True where the coefficient depends on the row's risk."""
        return self.regularizer.objective in ("convex", "additive")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key.sub=value` overrides applied, in order.

    Raises:
        ConfigError: missing file, unknown key (the nearest valid name is suggested), wrong type,
            value out of range, or an impossible combination.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"expected a configuration file, found none at {path}: check the path")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(err).split())}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return config_from_dict(raw)


def config_from_dict(raw: Mapping[str, Any]) -> Config:
    """The configuration of a nested mapping; raises ConfigError like `load_config`."""
    raw = dict(raw)
    regularizer = raw.get("regularizer")
    if isinstance(regularizer, dict) and regularizer.get("preset") is not None:
        preset = regularizer["preset"]
        _one_of("regularizer.preset", preset, tuple(PRESETS))
        raw["regularizer"] = {**PRESETS[preset], **regularizer}
    return _build(Config, raw, "")


def config_to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal object."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must read key=value, e.g. train.steps=100")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from err


def _build(cls: Any, raw: Any, where: str) -> Any:
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be a section of keys, got {raw!r}")
    known = {f.name: f for f in fields(cls)}
    hints = get_type_hints(cls)
    for key in raw:
        if key not in known:
            raise ConfigError(_unknown_key(f"{where}.{key}".lstrip("."), str(key), list(known)))
    values = {}
    for key, value in raw.items():
        hint = hints[key]
        name = f"{where}.{key}".lstrip(".")
        values[key] = _build(hint, value, name) if is_dataclass(hint) else _cast(hint, value, name)
    missing = [f.name for f in known.values() if _is_required(f) and f.name not in values]
    if missing:
        names = ", ".join(f"{where}.{name}".lstrip(".") for name in missing)
        raise ConfigError(f"missing key {names}: add it to the configuration")
    return cls(**values)


def _is_required(field_: Field) -> bool:
    return field_.default is MISSING and field_.default_factory is MISSING


def _unknown_key(full: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {full!r}: did you mean {near[0]!r}? (valid here: {', '.join(known)})"


def _cast(hint: Any, value: Any, name: str) -> Any:
    """The value as the annotated type; text like 1e-5, which YAML reads as a string, is a float."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options or hint is None:
            return None
        raise ConfigError(f"{name} must not be null: give a {_type_name(hint)}")
    if bool in options and isinstance(value, bool):
        return value
    if isinstance(value, bool):
        raise ConfigError(f"{name} must be {_type_name(hint)}, got {value!r}")
    if int in options and isinstance(value, int):
        return value
    if float in options:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    if str in options and isinstance(value, str):
        return value
    raise ConfigError(f"{name} must be {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("NoneType", "null").replace("None", "null")


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def _at_least(name: str, value: float, low: float) -> None:
    if not low <= value < math.inf:  # nan is refused as well
        raise ConfigError(f"{name} must be finite and at least {low}, got {value}")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive and finite, got {value}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie in [{low}, {high}], got {value}")
