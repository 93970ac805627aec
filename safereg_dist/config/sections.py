"""The sections of the configuration, and the whole: frozen models, a sentence a field."""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from safereg_dist.config.checks import within
from safereg_dist.config.data import DataConfig
from safereg_dist.config.risk import RiskConfig, check_signal
from safereg_dist.config.section import ASIDE, MODEL, NEWER, READ, WRITTEN, Place, Section
from safereg_dist.config.tracking import TrackingConfig
from safereg_dist.errors import ConfigError

Offload = Literal["none", "cpu"]

_ADAPTER_NAME = re.compile(r"(?!.*lora_)[A-Za-z0-9_-]+")

TRAINED_ADAPTER = "default"
"""The name, PEFT's own, of the adapter that a run trains."""

KEEP_BYTES = 256 << 20
"""Default of `reference.keep_bytes`."""

POLICY_RISK_IS_TOO_LATE = (
    "risk.source=policy gives the risk inside the policy's forward, where a reference that is the "
    "policy with its adapters off cannot run: set risk.source=reference"
)

_SOFT = dict(
    objective="convex", divergence="kl_forward", floor=0.1, ceiling=0.9, granularity="batch"
)
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2602.17546: linear in the risk of the batch.
    "paper": {**_SOFT, "schedule": "linear"},
    # The authors' released script: break points on a judge's 1-5 scale instead of a line.
    "official": {**_SOFT, "schedule": "clamp"},
}


class ReferenceConfig(Section):
    """The frozen model that risky rows are pulled toward."""

    model: Annotated[str | None, MODEL] = None
    """Path or hub id; null = the weights of `model` before training."""
    engine: Literal["auto", "adapters_off", "zero3", "fsdp2", "whole"] = Field(
        default="auto", json_schema_extra=ASIDE | NEWER
    )
    """What runs it: the policy with its `adapters_off`, ZeRO-3 inference (`zero3`), `fsdp2`, or a
    `whole` copy on each rank; `auto`: adapters off if there are any and `model` is null, else as
    the policy is sharded, else `fsdp2` on several ranks."""
    adapter: str | None = Field(default=None, json_schema_extra=NEWER)
    """Name of a trained adapter that stays on in the reference (`adapters_off`): in a run one of
    `lora.frozen`, in a Trainer or a loop any of the model's; null = none."""
    offload: Offload = "none"
    """`none` or `cpu`: where the reference's shards rest between uses."""
    cache: Annotated[str | None, READ] = Field(default=None, json_schema_extra=ASIDE)
    """Folder written by `safereg reference build`: no trunk runs on rows it holds; null = none."""
    rows_per_pass: int | None = Field(default=None, ge=1)
    """Rows in one reference forward, >= 1; null = `train.micro_batch_size`. Bounds memory."""
    keep_bytes: int = Field(default=KEEP_BYTES, ge=0, json_schema_extra=ASIDE)
    """Bytes of reference states kept for later micro-batches, >= 0; one micro-batch always fits."""
    balance: Literal["auto", "none", "deal", "exchange"] = "auto"
    """How active rows are balanced over ranks: `deal` them evenly (needs a risk column), `exchange`
    them while training, `none`, or `auto`: `deal` where risk is a column, else `none`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.adapter is not None and self.model is not None:
            raise ConfigError(
                f"reference.adapter={self.adapter!r} stays on in the model that trains, and "
                f"reference.model={self.model!r} is another one: set one of them to null"
            )
        if self.cache is not None and self.balance == "exchange":
            raise ConfigError(
                "reference.balance=exchange moves rows to run the trunk on, but with "
                "reference.cache none runs: set balance=auto"
            )
        return self


class RegularizerConfig(Section):
    """How risk becomes a coefficient, and what the coefficient weighs."""

    objective: Literal["convex", "additive", "static", "token_wise", "none"] = "convex"
    """`convex` (1-b)*CE + b*D, `additive` CE + b*D, `static` convex with b = ceiling, `token_wise`
    (the constrained fine-tuning of arXiv 2406.05946, on every row, without risk), or `none`."""
    divergence: Literal["kl_forward", "kl_reverse", "l2_logits"] = "kl_forward"
    """`kl_forward` KL(ref||policy), `kl_reverse` KL(policy||ref), or `l2_logits`."""
    schedule: Literal["step", "threshold", "linear", "clamp", "sigmoid", "budget"] = "step"
    """`step`, `threshold`, `linear`, `clamp` or `sigmoid` (see `coefficient`), or `budget`: risky
    rows get what keeps the divergence at `budget`, at most the ceiling."""
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    """Risk at which regularisation sets in, in [0, 1]; null = the probe's own, else 0.5."""
    floor: float = Field(default=0.0, ge=0.0)
    """Coefficient of a harmless row, >= 0."""
    ceiling: float = Field(default=1.0, ge=0.0)
    """Coefficient of a risky row, >= floor; at most 1 unless the objective is `additive`."""
    budget: float | None = Field(default=None, gt=0, json_schema_extra=NEWER)
    """Divergence of active tokens to aim at, nats a token, > 0; needed with schedule `budget`."""
    budget_gains: tuple[float, float, float] = Field(
        default=(0.1, 0.05, 0.0), json_schema_extra=NEWER
    )
    """Proportional, integral and derivative gain of the controller of schedule `budget`, >= 0; an
    error is (divergence - budget) / budget."""
    slope: float = Field(default=12.0, gt=0)
    """Steepness of `sigmoid` per unit of risk, > 0."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the moving average of the batch risk, in [0, 1); only with granularity `batch`."""
    granularity: Literal["sequence", "batch"] = "sequence"
    """`sequence` (each row its own coefficient) or `batch` (one for a micro-batch on all ranks)."""
    preset: Literal["paper", "official"] | None = None
    """null, `paper` or `official`: fills the keys that are not given."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        return {**PRESETS[preset], **given} if preset in tuple(PRESETS) else given

    @model_validator(mode="after")
    def _check(self) -> Self:
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
        self._check_budget()
        if self.ema > 0 and self.granularity != "batch":
            raise ConfigError(
                "regularizer.ema smooths the risk of a batch: set regularizer.granularity=batch, "
                "or ema=0"
            )
        return self

    def _check_budget(self) -> None:
        if (self.budget is not None) != (self.schedule == "budget"):
            raise ConfigError(
                "regularizer.budget and regularizer.schedule=budget go together, got "
                f"{self.budget} and {self.schedule}: give both or neither"
            )
        if min(self.budget_gains) < 0:
            raise ConfigError(
                f"regularizer.budget_gains must be >= 0, got {list(self.budget_gains)}"
            )
        if self.budget is not None and (
            self.objective not in ("convex", "additive") or self.granularity == "batch"
        ):
            raise ConfigError(
                "regularizer.schedule=budget moves the coefficient of risky rows: it needs "
                "objective=convex or additive and granularity=sequence, got "
                f"{self.objective} and {self.granularity}"
            )


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=1.0e-5, gt=0)
    """Peak learning rate, > 0."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay, >= 0."""
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    """Share of all steps spent warming up linearly, in [0, 1]."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """`cosine`, `linear` (both to `min_lr_ratio` * lr) or `constant` after the warm-up."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Final learning rate as a share of `lr`, in [0, 1]."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Gradients are scaled down to this global L2 norm; 0 = no clipping."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment, in [0, 1)."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's second moment, in [0, 1)."""
    eps: float = Field(default=1.0e-8, gt=0)
    """AdamW's epsilon, > 0."""


class TrainConfig(Section):
    """Length, batch and bookkeeping of the run."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, >= 1; 200 when neither steps nor epochs is given."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows, > 0, instead of steps."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Rows per rank and forward, >= 1."""
    grad_accum_steps: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step, >= 1; the result does not depend on the split."""
    packing: bool = Field(default=False, json_schema_extra=NEWER)
    """Rows of a micro-batch stand in one line without padding; none attends to another."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16` (float32 master weights in the optimizer) or `fp32`."""
    activation_checkpointing: bool = False
    """Recompute decoder layers in the backward pass to save memory."""
    seed: int = Field(default=0, ge=0, le=(1 << 63) - 1)
    """Seed of data order, dropout and initial random states."""
    save_every: int = Field(default=0, ge=0, json_schema_extra=ASIDE)
    """Optimizer steps between checkpoints; 0 = none."""
    keep_checkpoints: int = Field(default=2, ge=1, json_schema_extra=ASIDE)
    """Newest checkpoints to keep, >= 1."""
    async_save: bool = Field(default=False, json_schema_extra=ASIDE | NEWER)
    """Ranks wait only until a checkpoint lies on their host's own disk; a thread of each copies it
    to `output_dir` while training goes on. The one before counts until that is done."""
    save_staging: Annotated[str | None, WRITTEN] = Field(
        default=None, json_schema_extra=ASIDE | NEWER
    )
    """Folder on each host's own disk for `async_save`, with room for its ranks' parts of one
    checkpoint; null = the host's temporary folder ($TMPDIR)."""
    resume: Annotated[str, Place(words=r"latest|never|\d+")] = Field(
        default="latest", json_schema_extra=ASIDE | NEWER
    )
    """The checkpoint to go on from: `latest` (the newest that is whole), a step or a checkpoint's
    folder (that one or none; for one start: the next one would go back again), or `never`, which
    refuses a run folder that has checkpoints."""
    eval_every: int = Field(default=0, ge=0)
    """Optimizer steps between validation losses; 0 = never."""
    head_bytes: int | None = Field(default=None, ge=1 << 20)
    """Bytes for the head's logits and their gradient, >= 1 MiB; null = 3 GiB on a GPU."""
    chunk_tokens: int | None = Field(default=None, ge=1)
    """Response tokens at a time in the head, >= 1, instead of `head_bytes`; null = by memory."""
    stack_loss: bool = Field(default=True, json_schema_extra=NEWER)
    """In another stack: its own loss stays where no rank has a row with b > 0 (without risk the
    same bits as before); `false`: our head computes every loss, and no logits are made."""
    export_shard_bytes: int = Field(default=5_000_000_000, ge=1, json_schema_extra=ASIDE)
    """Largest safetensors shard of the exported model, in bytes."""

    @field_validator("resume", mode="before")
    @classmethod
    def _step_or_folder(cls, given: Any) -> Any:
        text = str(given) if type(given) is int else given
        if text == "" or (isinstance(text, str) and re.fullmatch(r"-\d+|0+", text)):
            raise ConfigError(
                f"train.resume is {given!r}: expected latest, never, a step >= 1 or the folder of "
                "a checkpoint"
            )
        return text

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("train.steps and train.epochs are both set: keep one of them")
        if self.save_staging is not None and not self.async_save:
            raise ConfigError(
                "train.save_staging is where asynchronous saves begin, and train.async_save is "
                "false: set it to true, or save_staging to null"
            )
        return self


class EngineConfig(Section):
    """What shards and steps the model."""

    name: Literal["deepspeed", "fsdp2", "single"] = "deepspeed"
    """`deepspeed` (ZeRO) or `fsdp2` (torch's `fully_shard`), both on any number of ranks, or
    `single` (plain torch, one process)."""
    zero_stage: Literal[1, 2, 3] = 3
    """ZeRO stage of the deepspeed engine. 3 shards weights, gradients and optimizer state, 2 the
    last two, 1 the last alone: each rank holds the policy whole then, the reference its shard."""
    offload_optimizer: Offload = "none"
    """`none` or `cpu`: where optimizer state and master weights live."""
    offload_params: Offload = "none"
    """`none` or `cpu`: where the policy's shards rest between uses; with `fsdp2` gradients and the
    optimizer too."""
    hpz_partition_size: int = Field(default=1, ge=1)
    """Ranks that share a second copy of the policy's weights (ZeRO++ hpZ), e.g. the GPUs of a node:
    backward passes then gather inside the node. Must divide the number of ranks; 1 = off."""
    timeout_s: float = Field(default=1800.0, gt=0, le=30 * 86_400, json_schema_extra=ASIDE)
    """Timeout of a collective in seconds, > 0, at most 30 days: an error if
    some rank does not join it in time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "fsdp2" and (
            self.hpz_partition_size != 1 or self.offload_optimizer != "none"
        ):
            raise ConfigError(
                "engine.hpz_partition_size and engine.offload_optimizer are DeepSpeed's, got "
                f"{self.hpz_partition_size} and {self.offload_optimizer} with engine.name=fsdp2: "
                "set them to 1 and none (engine.offload_params=cpu takes the optimizer along)"
            )
        if self.is_replicated and (self.hpz_partition_size != 1 or self.offload_params != "none"):
            raise ConfigError(
                "engine.hpz_partition_size and engine.offload_params are for sharded weights, got "
                f"{self.hpz_partition_size} and {self.offload_params} with engine.zero_stage="
                f"{self.zero_stage}: set them to 1 and none, or zero_stage=3"
            )
        if self.name == "single" and self.hpz_partition_size != 1:
            raise ConfigError(
                f"engine.hpz_partition_size must be 1 with engine.name=single, got "
                f"{self.hpz_partition_size}: one process has nobody to share weights with"
            )
        return self

    @property
    def is_replicated(self) -> bool:
        """True where several ranks each hold the policy whole."""
        return self.name == "deepspeed" and self.zero_stage < 3


class LoraConfig(Section):
    """Low-rank adapters on a frozen policy, which without them is its own reference."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter, >= 1."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's output is scaled by alpha / rank, > 0."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on an adapter's input, in [0, 1)."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one, e.g. q_proj; empty = all but the head."""
    path: Annotated[str | None, READ] = None
    """Folder of a trained adapter (PEFT) to go on from; null = new ones."""
    modules_to_save: tuple[str, ...] = Field(default=(), json_schema_extra=NEWER)
    """Modules that are trained whole beside the adapters, e.g. lm_head; where each rank holds the
    weights whole (engine single, or engine.zero_stage 1 or 2)."""
    quantize: Literal["none", "nf4", "int8"] = Field(default="none", json_schema_extra=NEWER)
    """How bitsandbytes keeps the frozen weights (QLoRA): `none`, `nf4` (4 bits) or `int8`; on the
    same engines. Only the adapter is exported then."""
    frozen: Annotated[dict[str, str], READ] = Field(default={}, json_schema_extra=NEWER)
    """Adapters that were trained before (PEFT, plain LoRA), name -> folder: on in the policy, never
    trained, without dropout. `reference.adapter` keeps one of them on in the reference."""

    @field_validator("frozen", mode="before")
    @classmethod
    def _named_folders(cls, given: Any) -> Any:
        if given is None:
            return {}
        if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
            raise ConfigError(
                f"lora.frozen must name folders of adapters, as {{aligned: FOLDER}}, got {given!r}"
            )
        for name in given:
            if not _ADAPTER_NAME.fullmatch(str(name)) or name == TRAINED_ADAPTER:
                raise ConfigError(
                    f"lora.frozen names an adapter {name!r}: expected letters, digits, - and _, "
                    f"without lora_, and not {TRAINED_ADAPTER}, which is the one that trains"
                )
        return given


class EvalConfig(Section):
    """What is watched while the model trains."""

    canary: Annotated[str, READ]
    """Prompts (JSONL or CSV, as for `safereg eval`): on the harmful ones the probabilities of a
    refusal's first token and of a complying answer's are logged."""
    canary_every: int = Field(default=10, ge=1)
    """Optimizer steps between two looks, >= 1; the last step has one too."""
    refusal: str = "I'm sorry"
    """How a refusal begins, where a prompt has no `response`."""
    poisoned: str = "Sure"
    """How an answer that complies begins, where a prompt has no `complying`."""


class LisaConfig(Section):
    """Turns of safety rows and of `data.train`, each held near where it began (arXiv 2405.18641).

    All weights or adapters, in one process, with plain cross-entropy on both. Defaults are the
    authors' script's (git-disl/Lisa), its 100 and 900 steps shortened.
    """

    safety: Annotated[str, READ]
    """Safety rows (prompts with safe answers), in a form of `data.train`."""
    safety_steps: int = Field(default=10, ge=1)
    """Optimizer steps of a turn on safety rows, >= 1; the first turn is theirs."""
    task_steps: int = Field(default=90, ge=1)
    """Optimizer steps of a turn on `data.train`, >= 1; `train.steps` counts those of both."""
    rho: float = Field(default=1.0, ge=0)
    """Weight of the proximal term rho/2 |w - w'|^2 beside the loss, >= 0; w' are the weights at the
    last change of turns."""


class SigningConfig(Section):
    """A key over checkpoints, stored references and `summary.json`, the ledger's head in it; one of
    the two."""

    hmac_env: str | None = Field(
        default=None, pattern=r"^SAFEREG_[A-Z0-9_]+$", json_schema_extra=ASIDE
    )
    """Environment variable (SAFEREG_...) of rank 0 with a secret of 16 characters or more, for an
    HMAC (SHA256); who can check it can also sign."""
    ed25519: Annotated[str | None, READ] = Field(default=None, json_schema_extra=ASIDE)
    """Private key of rank 0 (PEM, no pass phrase; `openssl genpkey -algorithm ed25519`); its public
    key checks. Needs the extra `sign`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.hmac_env is None) == (self.ed25519 is None):
            raise ConfigError(
                "signing needs one of hmac_env and ed25519: name a variable SAFEREG_... or the "
                "file of a private key, or set signing=null"
            )
        return self


class Config(Section):
    """One training run."""

    model: Annotated[str, MODEL]
    """Path or hub id of the policy before training (safetensors)."""
    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    risk: RiskConfig = RiskConfig()
    regularizer: RegularizerConfig = RegularizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig | None = None
    """Adapters to train in place of all weights; null = none."""
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig | None = Field(default=None, json_schema_extra={**NEWER, **ASIDE})
    """What is watched in training; null = nothing."""
    lisa: LisaConfig | None = Field(default=None, json_schema_extra=NEWER)
    """Turns with safety rows, a rival to compare with; null = none."""
    signing: SigningConfig | None = Field(default=None, json_schema_extra=ASIDE | NEWER)
    """Key over checkpoints, stored references and the ledger's head; null = none."""
    tracking: TrackingConfig = Field(default=TrackingConfig(), json_schema_extra=ASIDE | NEWER)
    output_dir: Annotated[str, WRITTEN] = Field(default="runs/my-run", json_schema_extra=ASIDE)
    """Run folder: metrics, ledger, checkpoints, exported model."""
    profile: bool = Field(default=False, json_schema_extra=ASIDE)
    """Record FLOPs, bytes and seconds of every step, by region, into the run folder; losses stay
    the same bits, steps take longer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.needs_risk:
            check_signal(self.risk, "risk")
            self._check_ceilings()
        if self.regularizer.objective == "none" and self.data.anchor is not None:
            raise ConfigError(
                "data.anchor needs a reference, but regularizer.objective=none never runs one: "
                "set data.anchor=null, or objective=static with ceiling=0 for anchors alone"
            )
        self._check_reference()
        self._check_order()
        self._check_adapters()
        self._check_lisa()
        if self.train.eval_every and self.data.validation is None:
            raise ConfigError("train.eval_every needs data.validation: set it, or eval_every=0")
        return self

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
        if rule.schedule == "budget":
            raise ConfigError(
                "reference.balance=deal needs every row's coefficient beforehand, and "
                "regularizer.schedule=budget changes it with every step: set balance=none, exchange"
            )
        if rule.granularity == "batch":
            raise ConfigError(
                "reference.balance=deal needs regularizer.granularity=sequence: with batch a row's "
                "coefficient hangs on the rows beside it; set balance=none or exchange"
            )

    def _check_order(self) -> None:
        """Refuses what needs all rows beforehand, where they are streamed or drawn by weight."""
        deals = self.reference.balance == "deal"
        if deals and self.data.train_weights is not None:
            raise ConfigError(
                "reference.balance=deal shows each row once an epoch, data.train has weights: set "
                "balance=none or exchange, or drop the weights"
            )
        needs_all = {
            "train.epochs": self.train.epochs is not None,
            "reference.balance=deal": deals,
            "reference.cache": self.reference.cache is not None,
        }
        for name, is_set in needs_all.items():
            if self.data.streaming and is_set:
                raise ConfigError(
                    f"{name} needs to know all rows beforehand, data.streaming=true reads them as "
                    f"they come: drop {name} (train.steps says how long), or set streaming=false"
                )

    def _check_adapters(self) -> None:
        lora = self.lora
        if lora is not None and (lora.modules_to_save or lora.quantize != "none"):
            if self.engine.name != "single" and not self.engine.is_replicated:
                raise ConfigError(
                    "lora.modules_to_save and lora.quantize need the weights whole on each rank, "
                    f"and engine.name={self.engine.name} shards them: set engine.name=single, or "
                    "engine.name=deepspeed with engine.zero_stage=2"
                )
        wanted = self.reference.adapter
        if lora is not None and wanted is not None and wanted not in lora.frozen:
            raise ConfigError(
                f"reference.adapter={wanted!r} is none of lora.frozen ({', '.join(lora.frozen)}): "
                "name one of these, or add its folder there"
            )
        if not self.has_adapters_off:
            return
        if self.needs_risk and self.risk.estimator == "probe" and self.risk.source == "policy":
            raise ConfigError(POLICY_RISK_IS_TOO_LATE)

    def _check_lisa(self) -> None:
        if self.lisa is None:
            return
        if self.engine.name != "single" or self.regularizer.objective != "none":
            raise ConfigError(
                "lisa runs in one process with plain cross-entropy, got engine.name="
                f"{self.engine.name} and regularizer.objective={self.regularizer.objective}: set "
                "single and none"
            )
        if self.data.streaming or self.train.epochs is not None:
            raise ConfigError(
                "lisa takes turns between two sets of rows for train.steps in all: set train.steps "
                "in place of train.epochs, and data.streaming=false"
            )

    @property
    def has_adapters_off(self) -> bool:
        """True if the reference is the policy itself, its adapters off but `reference.adapter`."""
        if self.lora is None or not self.needs_reference or self.reference.cache is not None:
            return False
        own = self.reference.engine == "auto" and self.reference.model is None
        return own or self.reference.engine == "adapters_off"

    def _check_ceilings(self) -> None:
        rule = self.regularizer
        for part in self.risk.parts:
            if part.ceiling is None:
                continue
            where = f"risk.parts[{part.category}].ceiling"
            if rule.schedule == "budget":
                raise ConfigError(
                    f"{where} cannot be used: schedule=budget has one ceiling for all"
                )
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

    @property
    def deals_rows(self) -> bool:
        """True where active rows are known beforehand and dealt evenly over ranks and steps."""
        return (
            self.needs_risk
            and self.risk.estimator == "column"
            and self.reference.balance in ("auto", "deal")
            and self.regularizer.granularity == "sequence"  # else it hangs on the rows beside it
            and self.data.train_weights is None  # an even deal shows each row once an epoch
            and not self.data.streaming
        )
