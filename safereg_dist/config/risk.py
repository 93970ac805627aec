"""Where the risk of a row comes from: the section `risk` of the configuration."""

from dataclasses import dataclass, field

from safereg_dist.config.checks import at_least, one_of, positive, within
from safereg_dist.errors import ConfigError

ESTIMATORS = ("probe", "critic", "column", "none", "max", "weighted")
PART_ESTIMATORS = ("probe", "critic", "column")
POSITIONS = ("prompt", "response", "both")
FAIL_MODES = ("closed", "open", "stop")


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticConfig:
    """A judge model that scores training pairs: behind an endpoint, or local."""

    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1."""
    model: str | None = None
    """The model's name at the endpoint."""
    format: str | None = None
    """How it is asked and how its answer is read (`critic.formats`); null for a classifier."""
    local: str | None = None
    """Folder of a local Hugging Face classifier or guard, instead of an endpoint."""
    fail: str = "closed"
    """What a failed judgement means: `closed` risk 1, `open` risk 0, or `stop` the run."""
    concurrency: int = 16
    """Judgements in flight per rank, >= 1."""
    timeout_s: float = 30.0
    """Seconds for one judgement from when it may begin, with all its retries (one attempt may take
    half of it), > 0; then it has failed. Not for local judges."""
    retries: int = 4
    """Attempts after the first, >= 0."""
    cache: str | None = None
    """SQLite file of known scores; null = below $SAFEREG_CACHE, `none` = no cache."""
    api_key_env: str = "SAFEREG_API_KEY"
    """Environment variable that holds the endpoint's key, if it wants one."""

    def __post_init__(self) -> None:
        one_of("risk.critic.fail", self.fail, FAIL_MODES)
        at_least("risk.critic.concurrency", self.concurrency, 1)
        positive("risk.critic.timeout_s", self.timeout_s)
        at_least("risk.critic.retries", self.retries, 0)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskPart:
    """One of several signals, for one category of harm."""

    category: str
    """Name of the category in metrics and ledger."""
    estimator: str = "probe"
    """`probe` (on the reference), `critic` or `column`."""
    path: str | None = None
    """Folder written by `safereg probe fit`; required by `probe`."""
    position: str | None = None
    """`prompt`, `response` or `both`; null = what the probe's folder holds."""
    force: bool = False
    """Accept a probe that was fitted on another model's weights."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    threshold: float | None = None
    """Risk from which the category counts, in [0, 1]; null = the probe's own, else 0.5."""
    ceiling: float | None = None
    """Largest coefficient of this category, >= floor; null = `regularizer.ceiling`; `max` only."""
    weight: float = 1.0
    """Share in the mean of `weighted`, > 0; the weights need not sum to 1."""

    def __post_init__(self) -> None:
        where = f"risk.parts[{self.category}]"
        if not self.category or not all(c.isalnum() or c in "-_." for c in self.category):
            raise ConfigError(
                f"{where}.category must be letters, digits, `-`, `_` or `.`, got {self.category!r}"
            )
        one_of(f"{where}.estimator", self.estimator, PART_ESTIMATORS)
        check_signal(self, where)
        positive(f"{where}.weight", self.weight)
        if self.threshold is not None:
            within(f"{where}.threshold", self.threshold, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskConfig:
    """Where each row's risk in [0, 1] comes from."""

    estimator: str = "probe"
    """`probe`, `critic` (judge model), `column` (field `risk`), `none`, or `max`, `weighted`."""
    path: str | None = None
    """Folder written by `safereg probe fit`; required by `probe`."""
    source: str = "reference"
    """`reference` (never drifts; cached) or `policy` (free, but drifts) hidden states."""
    position: str | None = None
    """`prompt`, `response` or `both`; null = what the probe's folder holds."""
    force: bool = False
    """Accept a probe that was fitted on another model's weights."""
    cache: str | None = None
    """SQLite file of a probe's risks; null = below $SAFEREG_CACHE, `none` = in memory only."""
    drift: str = "fallback"
    """What to do when the policy-side probe loses recall: `warn`, `fallback` or `realign`."""
    drift_every: int = 5
    """Optimizer steps between comparisons of both sides on a micro-batch, >= 1; source `policy`."""
    drift_recall: float = 0.9
    """Share of what the reference side flags that the policy side must flag too, in (0, 1]; acted
    upon once the comparisons hold eight flagged rows."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    parts: tuple[RiskPart, ...] = ()
    """The signals of `max` and `weighted`, one or more for each category of harm."""
    override: str | None = None
    """JSONL of reviewed rows: `id`, `action` (allow or hold) and `reason`; null = none."""
    max_held_back: float = 0.2
    """Share of rows at or above the threshold from which training refuses to start, in [0, 1]."""
    gate_rows: int = 256
    """Rows screened for that share where a critic or the policy side gives the risk, >= 0."""

    def __post_init__(self) -> None:
        one_of("risk.estimator", self.estimator, ESTIMATORS)
        one_of("risk.source", self.source, ("reference", "policy"))
        one_of("risk.drift", self.drift, ("warn", "fallback", "realign"))
        at_least("risk.drift_every", self.drift_every, 1)
        if not 0 < self.drift_recall <= 1:
            raise ConfigError(f"risk.drift_recall must lie in (0, 1], got {self.drift_recall}")
        within("risk.max_held_back", self.max_held_back, 0.0, 1.0)
        at_least("risk.gate_rows", self.gate_rows, 0)
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

    @property
    def is_composite(self) -> bool:
        """True where several signals are combined."""
        return self.estimator in ("max", "weighted")


def check_signal(signal: "RiskConfig | RiskPart", where: str) -> None:
    """Raises ConfigError where a probe has no folder or a critic no judge."""
    if signal.position is not None:
        one_of(f"{where}.position", signal.position, POSITIONS)
    if signal.estimator == "probe" and signal.path is None:
        raise ConfigError(
            f"{where}.estimator=probe needs {where}.path, a folder written by `safereg probe fit`: "
            f"set {where}.path, or {where}.estimator=column"
        )
    if signal.estimator == "critic":
        signal.critic.check(f"{where}.critic")
