"""Builds the risk stage of what `risk_specs` has read, and checks rows and overrides against it."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from safereg_dist.coefficient import DEFAULT_THRESHOLD, resolved_threshold
from safereg_dist.config import Config, RiskConfig
from safereg_dist.critic.critic import build_critic
from safereg_dist.data import TokenizedDataset
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.factory.references import BuiltReference, WeightsFacts
from safereg_dist.factory.risk_specs import SourceSpec
from safereg_dist.parallel.engine import Backend
from safereg_dist.reference import Reference
from safereg_dist.risk.cached import KnownRisks, Scorer, scorer_name
from safereg_dist.risk.drift import WatchedPolicyProbe
from safereg_dist.risk.influence_risk import InfluenceRisk
from safereg_dist.risk.judge import CriticRisk
from safereg_dist.risk.lookup import LookupRisk, read_scored
from safereg_dist.risk.override import Override, read_overrides
from safereg_dist.risk.probe import Probe, check_model
from safereg_dist.risk.probe_risk import ReferenceProbeRisk
from safereg_dist.risk.stage import ColumnRisk, RiskSource, RiskStage, WeightedSource
from safereg_dist.storage.score_cache import ScoreCache, default_cache_path


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
    sources = [WeightedSource(s.category, build(s), s.threshold, s.weight, s.probe) for s in specs]
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
