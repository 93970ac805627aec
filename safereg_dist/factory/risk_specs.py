"""What the section `risk` of the configuration names, read before any weights."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from safereg_dist.coefficient import DEFAULT_THRESHOLD
from safereg_dist.config import Config, CriticConfig, RiskConfig, RiskPart
from safereg_dist.config.checks import one_of
from safereg_dist.critic.formats import FORMATS
from safereg_dist.data.canary import watched_rows
from safereg_dist.errors import ConfigError, ProbeError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.risk.influence_risk import Watch
from safereg_dist.risk.probe import Probe, load_probes

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
