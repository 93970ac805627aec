"""Builds the risk stage from the section `risk` of the configuration."""

import hashlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from safereg_dist.coefficient import DEFAULT_THRESHOLD, resolved_threshold
from safereg_dist.config import Config, CriticConfig, RiskConfig, RiskPart
from safereg_dist.config.checks import one_of
from safereg_dist.critic.critic import build_critic
from safereg_dist.critic.formats import FORMATS
from safereg_dist.data import TokenizedDataset
from safereg_dist.data.canary import watched_rows
from safereg_dist.errors import ConfigError, DataError, ProbeError
from safereg_dist.factory.references import BuiltReference, WeightsFacts
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Backend
from safereg_dist.reference import Reference
from safereg_dist.risk.cached import KnownRisks, Scorer, scorer_name
from safereg_dist.risk.drift import WatchedPolicyProbe
from safereg_dist.risk.influence_risk import InfluenceRisk, Watch
from safereg_dist.risk.judge import CriticRisk
from safereg_dist.risk.lookup import LookupRisk, read_scored
from safereg_dist.risk.override import Override, read_overrides
from safereg_dist.risk.probe import Probe, check_model, load_probes
from safereg_dist.risk.probe_risk import ReferenceProbeRisk
from safereg_dist.risk.stage import ColumnRisk, RiskSource, RiskStage, WeightedSource
from safereg_dist.storage.score_cache import ScoreCache, default_cache_path

_GENERATION_TAG = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """One configured source of risk; its probe is read, nothing else is built."""

    category: str
    estimator: str
    path: str
    """The probe's folder, or the file of scored rows or watched prompts; empty without one."""
    probe: Probe | None
    watch: Watch | None
    """What `influence` watches, as tokens."""
    critic: CriticConfig
    force: bool
    threshold: float
    weight: float
    ceiling: float | None


def read_sources(
    config: Config, ranks: Ranks, tokenizer: PreTrainedTokenizerBase | None
) -> list[SourceSpec]:
    """The configured sources; reads probes before any model, so that a wrong path fails early.

    A probe for prompts and one for responses in one folder are two sources. The prompts that
    `influence` watches are tokenised here.

    Raises:
        ProbeError: a folder lacks the configured probe.
        ConfigError: a judge's format that does not exist, or one category twice; no tokenizer.
        DataError: watched prompts that cannot be used.
    Collectives: one gather of texts.
    """
    risk = config.risk
    if not config.needs_risk:
        return []
    with ranks.together():
        if not risk.is_composite:
            specs = _specs_of(risk, "", ranks, tokenizer)
        else:
            specs = [
                spec
                for part in risk.parts
                for spec in _specs_of(part, part.category, ranks, tokenizer)
            ]
        if risk.estimator == "probe" and risk.source == "policy" and len(specs) > 1:
            raise ConfigError(
                f"risk.source=policy reads one layer, {risk.path} holds two probes: set "
                "risk.position=prompt or response"
            )
        names = [spec.category for spec in specs]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"risk.parts give the categories {names}, where a folder with two probes counts as "
                "two: rename a part, so that no category occurs twice"
            )
    return specs


def check_templates(specs: list[SourceSpec], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ProbeError where a probe was fitted with another chat template, unless forced.

    The tokens before the answer are the template's, and a probe reads their states. Generation
    blocks add no token: with and without them it is the same template.
    """
    template = tokenizer.chat_template
    own = [template, _GENERATION_TAG.sub("", template)] if isinstance(template, str) else []
    known = {None, *(hashlib.sha256(text.encode()).hexdigest() for text in own)}
    for spec in specs:
        wanted = None if spec.probe is None else spec.probe.meta.get("template_sha256")
        if wanted not in known and not spec.force:
            raise ProbeError(
                f"the probe{f' of {spec.category}' if spec.category else ''} was fitted with "
                "another chat template than the one that training uses: fit it again with this "
                "tokenizer, or set risk.force=true (of a part: its own `force`)"
            )


def _specs_of(
    part: RiskConfig | RiskPart,
    category: str,
    ranks: Ranks,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[SourceSpec]:
    own_threshold = part.threshold if isinstance(part, RiskPart) else None

    def spec(category: str, probe: Probe | None, watch: Watch | None = None) -> SourceSpec:
        default = DEFAULT_THRESHOLD if probe is None else probe.threshold
        return SourceSpec(
            category=category,
            estimator=part.estimator,
            path=part.path or "",
            probe=probe,
            watch=watch,
            critic=part.critic,
            force=part.force,
            threshold=default if own_threshold is None else own_threshold,
            weight=part.weight if isinstance(part, RiskPart) else 1.0,
            ceiling=part.ceiling if isinstance(part, RiskPart) else None,
        )

    if part.estimator == "critic" and part.critic.format is not None:
        where = f"risk.parts[{category}]" if category else "risk"
        one_of(f"{where}.critic.format", part.critic.format, sorted(FORMATS))
    if part.estimator == "influence":
        return [spec(category, None, _watch_of(part, tokenizer))]
    if part.estimator != "probe":
        return [spec(category, None)]
    assert part.path is not None
    probes = [probe.to(ranks.device) for probe in _wanted_probes(part.path, part.position)]
    if len(probes) == 1:
        return [spec(category, probes[0])]
    return [spec(f"{category}-{p.position}".lstrip("-"), p) for p in probes]


def _watch_of(part: RiskConfig | RiskPart, tokenizer: PreTrainedTokenizerBase | None) -> Watch:
    assert part.path is not None
    if tokenizer is None:
        raise ConfigError(
            "estimator=influence tokenises the prompts that it watches and has no tokenizer: give "
            "`tokenizer` (see `prepare`); a Megatron run has no whole reference for it: score the "
            "rows with another estimator"
        )
    return Watch(watched_rows(part.path, part.influence, tokenizer), part.influence)


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


def policy_layer(config: Config, specs: list[SourceSpec]) -> int | None:
    """The decoder layer of the policy that a probe reads; None without such a probe."""
    reads = config.needs_risk and config.risk.estimator == "probe"
    if not reads or config.risk.source != "policy":
        return None
    assert specs[0].probe is not None
    return specs[0].probe.layer


def category_ceilings(specs: list[SourceSpec]) -> dict[str, float]:
    """Category -> its largest coefficient, where one is configured."""
    return {s.category: s.ceiling for s in specs if s.ceiling is not None}


def build_risk(
    config: Config,
    specs: list[SourceSpec],
    backend: Backend,
    reference: BuiltReference,
    *,
    overrides: Mapping[str, Override],
    policy: WeightsFacts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    probe_risk: Callable[[SourceSpec], RiskSource] | None = None,
) -> RiskStage:
    """The risk stage of a run; `policy` may be None where nothing trains (audit).

    `tokenizer` is given where rows come as tokens only; a source that reads text needs it.
    `probe_risk` makes the source of a probe where a stack runs the probed model itself.

    Raises:
        ProbeError: a probe belongs to another model.
        CriticUnavailable: an endpoint does not answer.
        ConfigError: a judge that cannot be used.
    Collectives: none.
    """
    if not config.needs_risk:
        return RiskStage([WeightedSource("", RiskSource(), DEFAULT_THRESHOLD)])
    build = _Builder(config, backend, reference, policy, tokenizer, probe_risk)
    sources = [WeightedSource(s.category, build(s), s.threshold, s.weight) for s in specs]
    rule = "max" if len(sources) > 1 else "single"  # one folder: prompts and responses
    if config.risk.is_composite:
        rule = config.risk.estimator
    return RiskStage(sources, rule=rule, overrides=overrides)


class _Builder:
    """Makes a source of risk."""

    def __init__(
        self,
        config: Config,
        backend: Backend,
        reference: BuiltReference,
        policy: WeightsFacts | None,
        tokenizer: PreTrainedTokenizerBase | None,
        probe_risk: Callable[[SourceSpec], RiskSource] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._of_probe = probe_risk or self._probe_risk
        self._config = config
        self._backend = backend
        self._reference = reference
        self._policy = policy
        self._cache: ScoreCache | None = None

    def __call__(self, spec: SourceSpec) -> RiskSource:
        match spec.estimator:
            case "none":
                return RiskSource()
            case "column":
                return ColumnRisk()
            case "critic":
                return CriticRisk(
                    build_critic(spec.critic, device=self._backend.ranks.device),
                    announces=self._backend.ranks.is_main,
                    tokenizer=self._tokenizer,
                )
            case "lookup":
                return LookupRisk(
                    read_scored(spec.path),
                    self._tokenizer,
                    path=spec.path,
                    announces=self._backend.ranks.is_main,
                )
            case "influence":
                return self._influence_risk(spec)
        return self._of_probe(spec)

    def _influence_risk(self, spec: SourceSpec) -> RiskSource:
        assert spec.watch is not None
        reference, facts = self._reference.reference, self._reference.facts
        if not isinstance(reference, Reference):
            raise ConfigError(
                "estimator=influence needs the reference's own last states and head, and here it "
                "has none: score the rows with another estimator"
            )
        known = None if facts is None else self._known_risks(spec.watch, facts, "influence")
        return InfluenceRisk(
            spec.watch,
            reference,
            ranks=self._backend.ranks,
            rows_per_pass=reference.packing.rows_per_pass,
            head_bytes=self._config.train.head_bytes,
            known=known,
        )

    def _probe_risk(self, spec: SourceSpec) -> RiskSource:
        assert spec.probe is not None
        reference, facts, risk = self._reference.reference, self._reference.facts, self._config.risk
        assert isinstance(reference, Reference)
        assert facts is not None
        _check(spec, spec.probe, facts)
        reads_policy = not risk.is_composite and risk.source == "policy"
        frozen = ReferenceProbeRisk(
            spec.probe,
            reference,
            ranks=self._backend.ranks,
            rows_per_pass=self._config.reference.rows_per_pass
            or self._config.train.micro_batch_size,
            known=self._known_risks(spec.probe, facts, "probe"),
            is_asked_seldom=reads_policy,
        )
        if not reads_policy:
            return frozen
        if self._policy is not None:
            _check(spec, spec.probe, self._policy)
        return WatchedPolicyProbe(
            spec.probe,
            frozen,
            settings=risk,
            threshold=resolved_threshold(self._config.regularizer, spec.threshold),
            ranks=self._backend.ranks,
        )

    def _known_risks(self, scorer: Scorer, facts: WeightsFacts, kind: str) -> KnownRisks | None:
        path = self._config.risk.cache
        if path == "none":
            return None
        if self._cache is None:
            self._cache = ScoreCache(default_cache_path() if path is None else Path(path))
        precision = self._config.train.precision
        name = scorer_name(scorer, facts.fingerprint, precision, kind=kind)
        return KnownRisks(self._cache, name)


def _check(spec: SourceSpec, probe: Probe, model: WeightsFacts) -> None:
    check_model(
        probe,
        fingerprint=model.fingerprint,
        hidden_size=model.config.hidden_size,
        num_layers=model.config.num_hidden_layers,
        force=spec.force,
        adapter=model.adapter,
    )


def reads_column(risk: RiskConfig) -> bool:
    """True if a source is the data's `risk` column."""
    return "column" in (risk.estimator, *(part.estimator for part in risk.parts))


def configured_overrides(config: Config) -> dict[str, Override]:
    """The reviewers' decisions by row id; none where risk is not needed.

    Raises:
        DataError: as `read_overrides`.
    """
    if not config.needs_risk or config.risk.override is None:
        return {}
    return read_overrides(config.risk.override)


def warn_of_unknown_rows(
    overrides: Mapping[str, Override], config: Config, rows: TokenizedDataset
) -> None:
    """Prints how many decisions name no training row, if any does."""
    unknown = overrides.keys() - set(rows.table["id"]) if overrides else set()
    if unknown:
        print(
            f"safereg: {len(unknown)} ids in risk.override={config.risk.override} name no row that "
            f"{config.data.train_names} leaves to train on, the first is {min(unknown)!r}: those "
            "decisions have no effect; "
            "correct them (a row without `id` is named after its file)",
            file=sys.stderr,
            flush=True,
        )


def warn_of_unscored_rows(
    overrides: Mapping[str, Override], config: Config, risk: RiskStage
) -> None:
    """Prints how many decisions name no row that a lookup finds, if any does.

    Stacks drop ids: there a decision acts by the id of the scored row.
    """
    lookups = [s.source for s in risk.sources if isinstance(s.source, LookupRisk)]
    lost = set(overrides)
    for source in lookups:
        lost &= set(source.without_effect(lost))
    if lookups and lost:
        print(
            f"safereg: {len(lost)} ids in risk.override={config.risk.override} are of no row that "
            f"risk.path finds, the first is {min(lost)!r}: they act only on rows that come with "
            "that id; of scored rows with the same texts decide on the riskier, else on the first",
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
