"""From the section `risk` of the configuration to the stage that gives every row its risk."""

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.coefficient import DEFAULT_THRESHOLD
from safereg_dist.config import Config, CriticConfig, RiskConfig, RiskPart
from safereg_dist.config.checks import one_of
from safereg_dist.critic.critic import build_critic
from safereg_dist.critic.formats import FORMATS
from safereg_dist.data import TokenizedDataset
from safereg_dist.errors import ConfigError, DataError, ProbeError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Backend
from safereg_dist.reference import NoReference, Reference
from safereg_dist.risk.base import ColumnRisk, NoRisk, RiskEstimator
from safereg_dist.risk.combine import Part, RiskStage
from safereg_dist.risk.drift import WatchedPolicyProbe
from safereg_dist.risk.judge import CriticRisk
from safereg_dist.risk.override import read_overrides
from safereg_dist.risk.probe import Probe, check_model, load_probes
from safereg_dist.risk.probe_risk import KnownRisks, ReferenceProbeRisk, scorer_name
from safereg_dist.storage.score_cache import ScoreCache, default_cache_path

_GENERATION_TAG = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """One signal as configured, with its probe read and nothing else built."""

    category: str
    estimator: str
    probe: Probe | None
    critic: CriticConfig
    force: bool
    threshold: float
    weight: float
    ceiling: float | None


def read_sources(config: Config, ranks: Ranks) -> list[SourceSpec]:
    """The configured signals; probes are read before any model is, so that a wrong path is told.

    A probe for prompts and one for responses in one folder are two signals.

    Raises:
        ProbeError: a folder without the probe that is asked for.
        ConfigError: a judge's format that does not exist, or one category twice.
    Collectives: one gather of texts.
    """
    risk = config.risk
    if not config.needs_risk:
        return []
    with ranks.together():
        if not risk.is_composite:
            signals = _signals_of(risk, "", ranks)
        else:
            signals = [s for part in risk.parts for s in _signals_of(part, part.category, ranks)]
        if risk.estimator == "probe" and risk.source == "policy" and len(signals) > 1:
            raise ConfigError(
                f"risk.source=policy reads one layer, {risk.path} holds two probes: set "
                "risk.position=prompt or response"
            )
        names = [signal.category for signal in signals]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"risk.parts give the categories {names}, where a folder with two probes counts as "
                "two: rename a part, so that no category occurs twice"
            )
    return signals


def check_templates(signals: list[SourceSpec], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ProbeError where a probe was fitted with another chat template, unless forced.

    The tokens before the answer are the template's, and a probe reads their states. Generation
    blocks add no token: with and without them it is the same template.
    """
    template = tokenizer.chat_template
    own = [template, _GENERATION_TAG.sub("", template)] if isinstance(template, str) else []
    known = {None, *(hashlib.sha256(text.encode()).hexdigest() for text in own)}
    for signal in signals:
        wanted = None if signal.probe is None else signal.probe.meta.get("template_sha256")
        if wanted not in known and not signal.force:
            raise ProbeError(
                f"the probe{f' of {signal.category}' if signal.category else ''} was fitted with "
                "another chat template than the one that training uses: fit it again with this "
                "tokenizer, or set risk.force=true (of a part: its own `force`)"
            )


def _signals_of(part: RiskConfig | RiskPart, category: str, ranks: Ranks) -> list[SourceSpec]:
    own_threshold = part.threshold if isinstance(part, RiskPart) else None

    def signal(category: str, probe: Probe | None) -> SourceSpec:
        default = DEFAULT_THRESHOLD if probe is None else probe.threshold
        return SourceSpec(
            category=category,
            estimator=part.estimator,
            probe=probe,
            critic=part.critic,
            force=part.force,
            threshold=default if own_threshold is None else own_threshold,
            weight=part.weight if isinstance(part, RiskPart) else 1.0,
            ceiling=part.ceiling if isinstance(part, RiskPart) else None,
        )

    if part.estimator == "critic" and part.critic.format is not None:
        where = f"risk.parts[{category}]" if category else "risk"
        one_of(f"{where}.critic.format", part.critic.format, sorted(FORMATS))
    if part.estimator != "probe":
        return [signal(category, None)]
    assert part.path is not None
    probes = [probe.to(ranks.device) for probe in _wanted_probes(part.path, part.position)]
    if len(probes) == 1:
        return [signal(category, probes[0])]
    return [signal(f"{category}-{p.position}".lstrip("-"), p) for p in probes]


def _wanted_probes(path: str, position: str | None) -> list[Probe]:
    found = load_probes(Path(path))
    wanted = [p for p in found if position in (None, "both", p.position)]
    if not wanted or (position == "both" and len(wanted) < 2):
        raise ProbeError(
            f"{path} holds a probe for the {' and '.join(p.position for p in found)}, the "
            f"configuration asks for position={position}: run `safereg probe fit --position "
            f"{position}`"
        )
    return wanted


def policy_layer(config: Config, signals: list[SourceSpec]) -> int | None:
    """The decoder layer of the policy that a probe reads, if one does."""
    reads = config.needs_risk and config.risk.estimator == "probe"
    if not reads or config.risk.source != "policy":
        return None
    assert signals[0].probe is not None
    return signals[0].probe.layer


def category_ceilings(signals: list[SourceSpec]) -> dict[str, float]:
    """The largest coefficient of each category that has one of its own."""
    return {s.category: s.ceiling for s in signals if s.ceiling is not None}


def build_risk(
    config: Config,
    signals: list[SourceSpec],
    backend: Backend,
    reference: Reference | NoReference,
    policy: PreTrainedModel | None,
    fingerprints: dict[str, str],
) -> RiskStage:
    """The risk stage of a run; `policy` may be None where nothing trains (audit).

    Raises:
        ProbeError: a probe belongs to another model.
        CriticUnavailable: an endpoint does not answer.
        ConfigError, DataError: a judge or an override file that cannot be used.
    Collectives: none.
    """
    if not config.needs_risk:
        return RiskStage([Part("", NoRisk(), DEFAULT_THRESHOLD)])
    build = _Builder(config, backend, reference, policy, fingerprints)
    parts = [Part(s.category, build(s), s.threshold, s.weight) for s in signals]
    rule = "max" if len(parts) > 1 else "single"  # two of one folder: prompts and responses
    if config.risk.is_composite:
        rule = config.risk.estimator
    overrides = read_overrides(config.risk.override) if config.risk.override else {}
    return RiskStage(parts, rule=rule, overrides=overrides)


class _Builder:
    """Makes the estimator of a signal."""

    def __init__(
        self,
        config: Config,
        backend: Backend,
        reference: Reference | NoReference,
        policy: PreTrainedModel | None,
        fingerprints: dict[str, str],
    ) -> None:
        self._config = config
        self._backend = backend
        self._reference = reference
        self._policy = policy
        self._fingerprints = fingerprints
        self._cache: ScoreCache | None = None

    def __call__(self, signal: SourceSpec) -> RiskEstimator:
        match signal.estimator:
            case "none":
                return NoRisk()
            case "column":
                return ColumnRisk()
            case "critic":
                return CriticRisk(
                    build_critic(signal.critic, device=self._backend.ranks.device),
                    announces=self._backend.ranks.is_main,
                )
        return self._probe_risk(signal)

    def _probe_risk(self, signal: SourceSpec) -> RiskEstimator:
        assert signal.probe is not None
        assert isinstance(self._reference, Reference)
        risk = self._config.risk
        self._check(signal, self._reference.config, "reference", force=signal.force)
        frozen = ReferenceProbeRisk(
            signal.probe,
            self._reference,
            ranks=self._backend.ranks,
            rows_per_pass=self._config.reference.rows_per_pass
            or self._config.train.micro_batch_size,
            known=self._known_risks(signal.probe),
        )
        if risk.is_composite or risk.source == "reference":
            return frozen
        if self._policy is not None:
            self._check(signal, self._policy.config.get_text_config(), "policy", force=signal.force)
        own = self._config.regularizer.threshold
        return WatchedPolicyProbe(
            signal.probe,
            frozen,
            settings=risk,
            threshold=signal.threshold if own is None else own,
            ranks=self._backend.ranks,
        )

    def _check(
        self, signal: SourceSpec, text_config: PreTrainedConfig, side: str, *, force: bool
    ) -> None:
        assert signal.probe is not None
        check_model(
            signal.probe,
            fingerprint=self._fingerprints[side],
            hidden_size=text_config.hidden_size,
            num_layers=text_config.num_hidden_layers,
            force=force,
        )

    def _known_risks(self, probe: Probe) -> KnownRisks | None:
        path = self._config.risk.cache
        if path == "none":
            return None
        if self._cache is None:
            self._cache = ScoreCache(default_cache_path() if path is None else Path(path))
        name = scorer_name(probe, self._fingerprints["reference"], self._config.train.precision)
        return KnownRisks(self._cache, name)


def reads_column(risk: RiskConfig) -> bool:
    """True where a signal is the data's own `risk`."""
    return "column" in (risk.estimator, *(part.estimator for part in risk.parts))


def check_overrides(override: str, rows: TokenizedDataset, path: str, *, is_main: bool) -> None:
    """Reads the reviewers' decisions before any model is loaded, and says which name no row.

    Raises:
        DataError: as `read_overrides`.
    """
    unknown = read_overrides(override).keys() - set(rows.table["id"])
    if unknown and is_main:
        print(
            f"safereg: {len(unknown)} ids in risk.override={override} name no row that {path} "
            f"leaves to train on, the first is {min(unknown)!r}: those decisions have no effect; "
            "correct them (a row without `id` is named after its file)",
            file=sys.stderr,
            flush=True,
        )


def require_risk_column(rows: TokenizedDataset, path: str) -> None:
    """Raises DataError where a row has no `risk`."""
    missing = np.flatnonzero(np.isnan(np.asarray(rows.table.data.column("risk"))))
    if missing.size:
        first = rows.table[int(missing[0])]["id"]
        raise DataError(
            f"{path}: risk.estimator=column needs `risk` in every row, {missing.size} rows have "
            f"none, the first is {first!r}: add it, or choose another estimator"
        )
