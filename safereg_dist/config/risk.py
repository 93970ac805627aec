"""Where the risk of a row comes from: the section `risk` of the configuration."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from safereg_dist.config.section import ASIDE, MODEL, NEWER, READ, WRITTEN, Section
from safereg_dist.errors import ConfigError

Position = Literal["prompt", "response", "both"]


class CriticConfig(Section):
    """A judge model that scores training pairs: behind an endpoint, or local."""

    endpoint: str | None = Field(default=None, json_schema_extra=ASIDE)
    """Base URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1."""
    model: str | None = None
    """The model's name at the endpoint."""
    format: str | None = None
    """Its prompt and the grammar of its answer (`critic.formats`); null for a classifier."""
    local: Annotated[str | None, MODEL] = None
    """Folder of a local Hugging Face classifier or guard, instead of an endpoint."""
    fail: Literal["closed", "open", "stop"] = "closed"
    """What a failed judgement means: `closed` risk 1, `open` risk 0, or `stop` the run."""
    concurrency: int = Field(default=16, ge=1, json_schema_extra=ASIDE)
    """Judgements in flight per rank, >= 1."""
    timeout_s: float = Field(default=30.0, gt=0, json_schema_extra=ASIDE)
    """Seconds for one judgement from when it may begin, with all its retries (one attempt may take
    half of it), > 0; then it has failed. Not for local judges."""
    retries: int = Field(default=4, ge=0, json_schema_extra=ASIDE)
    """Attempts after the first, >= 0."""
    cache: Annotated[str | None, WRITTEN] = Field(default=None, json_schema_extra=ASIDE)
    """SQLite file of known scores; null = below $SAFEREG_CACHE, `none` = no cache."""
    api_key_env: str = Field(default="SAFEREG_API_KEY", json_schema_extra=ASIDE)
    """Environment variable that holds the endpoint's key, if it wants one; begins with SAFEREG_."""
    allow_plain_http: bool = Field(default=False, json_schema_extra=ASIDE)
    """Send the key over plain http to another machine too, where anybody on the way reads it."""

    def check(self, where: str) -> None:
        """Raises ConfigError unless exactly one judge is described."""
        if (self.endpoint is None) == (self.local is None):
            raise ConfigError(
                f"{where} needs either `endpoint` (with `model` and `format`) or `local`, got "
                f"endpoint={self.endpoint!r}, local={self.local!r}: set one of them"
            )
        if self.endpoint is not None and (self.model is None or self.format is None):
            raise ConfigError(
                f"{where}.endpoint needs `model` and `format` too, got model={self.model!r}, "
                f"format={self.format!r}: set them"
            )


class InfluenceConfig(Section):
    """What `influence` watches: would training on a row lower the probability of a refusal?"""

    refusal: str = "I'm sorry"
    """How the model refuses, where a harmful prompt of `path` has no `response`."""
    complying: str = "Sure"
    """How an answer that complies begins, where a harmful prompt has no `complying`."""
    prompts: int = Field(default=32, ge=1)
    """Harmful prompts that are watched, the first of the file, >= 1; memory grows with them."""
    positions: int = Field(default=3, ge=1)
    """Tokens of each refusal, and of each complying answer, that are watched, >= 1."""
    tokens_per_row: int = Field(default=64, ge=1)
    """Response tokens of a row whose logits are formed, those most aligned with the watched, >= 1;
    the cost of the head grows with them."""
    false_positives: float = Field(default=0.05, gt=0, lt=1)
    """Share of the file's benign rows that may have a risk of 0.5 or more, in (0, 1)."""


class RiskPart(Section):
    """One of several sources of risk, for one category of harm."""

    category: str
    """Name of the category in metrics and ledger."""
    estimator: Literal["probe", "critic", "column", "lookup", "influence"] = "probe"
    """`probe` (on the reference), `critic`, `column`, `lookup` or `influence`."""
    path: Annotated[str | None, READ] = None
    """Folder written by `safereg probe fit`, the scored rows of `lookup`, or the watched prompts of
    `influence`; required by these."""
    position: Position | None = None
    """`prompt`, `response` or `both`; null = what the probe's folder holds."""
    force: bool = False
    """Accept a probe that was fitted on another model's weights."""
    critic: CriticConfig = CriticConfig()
    influence: InfluenceConfig = Field(default=InfluenceConfig(), json_schema_extra=NEWER)
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    """Risk from which the category counts, in [0, 1]; null = the probe's own, else 0.5."""
    ceiling: float | None = None
    """Largest coefficient of this category, >= floor; null = `regularizer.ceiling`; `max` only."""
    weight: float = Field(default=1.0, gt=0)
    """Share in the mean of `weighted`, > 0; the weights need not sum to 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        where = f"risk.parts[{self.category}]"
        if not self.category or not all(c.isalnum() or c in "-_." for c in self.category):
            raise ConfigError(
                f"{where}.category must be letters, digits, `-`, `_` or `.`, got {self.category!r}"
            )
        check_signal(self, where)
        return self


class RiskConfig(Section):
    """Where each row's risk in [0, 1] comes from."""

    estimator: Literal[
        "probe", "critic", "column", "lookup", "influence", "none", "max", "weighted"
    ] = "probe"
    """`probe`, `critic` (judge model), `column` (field `risk`), `lookup` (by text, in a file that
    `safereg score` wrote), `influence` (what training on the row does to refusals), `none`, or
    `max`, `weighted`."""
    path: Annotated[str | None, READ] = None
    """Folder written by `safereg probe fit`, the scored rows of `lookup`, or the watched prompts of
    `influence` (as for `eval.canary`, with benign rows and their answers); required by these."""
    source: Literal["reference", "policy"] = "reference"
    """`reference` (never drifts; cached) or `policy` (free, but drifts) hidden states."""
    position: Position | None = None
    """`prompt`, `response` or `both`; null = what the probe's folder holds."""
    force: bool = False
    """Accept a probe that was fitted on another model's weights."""
    cache: Annotated[str | None, WRITTEN] = Field(default=None, json_schema_extra=ASIDE)
    """SQLite file of the risks of a probe or of influence; null = below $SAFEREG_CACHE, `none` = in
    memory only."""
    drift: Literal["warn", "fallback", "realign"] = "fallback"
    """What to do when the policy-side probe loses recall: `warn`, `fallback` or `realign`."""
    drift_every: int = Field(default=5, ge=1)
    """Optimizer steps between checks with the reference on a micro-batch, >= 1; `policy` only."""
    drift_recall: float = Field(default=0.9, gt=0, le=1)
    """Smallest share of the rows flagged on the reference that must be flagged on the policy too,
    in (0, 1]; applies once the comparisons hold eight flagged rows."""
    critic: CriticConfig = CriticConfig()
    influence: InfluenceConfig = Field(default=InfluenceConfig(), json_schema_extra=NEWER)
    parts: tuple[RiskPart, ...] = ()
    """The sources of `max` and `weighted`, one or more for each category of harm."""
    override: Annotated[str | None, READ] = None
    """JSONL of reviewed rows: `id`, `action` (allow or hold) and `reason`; null = none."""
    max_held_back: float = Field(default=0.2, ge=0.0, le=1.0, json_schema_extra=ASIDE)
    """Share of rows at or above the threshold from which training refuses to start, in [0, 1]."""
    max_hidden: float = Field(default=0.02, ge=0.0, le=1.0, json_schema_extra=ASIDE)
    """Share of rows that may hide just below the threshold, or behind a harmless prompt, from which
    training refuses to start, in [0, 1]; 1 = any."""
    gate_rows: int = Field(default=256, ge=0, json_schema_extra=ASIDE)
    """Rows checked for that share if a critic or a probe on the policy gives the risk, or rows are
    streamed, >= 0."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.is_composite != bool(self.parts):
            raise ConfigError(
                f"risk.parts belongs to the estimators max and weighted, got {len(self.parts)} "
                f"parts with estimator {self.estimator}: give one part or more, or drop them"
            )
        if self.is_composite and self.source == "policy":
            raise ConfigError(
                "risk.source=policy is for a single probe; the parts of max and weighted read the "
                "reference: set risk.source=reference"
            )
        names = [part.category for part in self.parts]
        if len(set(names)) < len(names):
            raise ConfigError(f"risk.parts must have different categories, got {names}")
        if self.estimator == "weighted" and any(p.ceiling is not None for p in self.parts):
            raise ConfigError(
                "risk.parts[].ceiling needs risk.estimator=max: a weighted mean has one coefficient"
            )
        return self

    @property
    def is_composite(self) -> bool:
        """True if several sources are combined."""
        return self.estimator in ("max", "weighted")


def check_signal(signal: "RiskConfig | RiskPart", where: str) -> None:
    """Raises ConfigError where what a source reads is not named, or a critic has no judge."""
    if signal.estimator == "lookup" and signal.path is None:
        raise ConfigError(
            f"{where}.estimator=lookup needs {where}.path, a file of rows that `safereg score` "
            "wrote: set it"
        )
    if signal.estimator == "influence" and signal.path is None:
        raise ConfigError(
            f"{where}.estimator=influence needs {where}.path, a file of harmful prompts that the "
            "model refuses and of benign rows with their answers: set it"
        )
    if signal.estimator == "probe" and signal.path is None:
        raise ConfigError(
            f"{where}.estimator=probe needs {where}.path, a folder written by `safereg probe fit`: "
            f"set {where}.path, or {where}.estimator=column"
        )
    if signal.estimator == "critic":
        signal.critic.check(f"{where}.critic")
