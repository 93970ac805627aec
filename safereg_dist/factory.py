"""From a configuration to the objects of a run; each is built here and nowhere else."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.batch import RowStore, RowStream, load_rows, load_tokenizer, steps_for
from safereg_dist.coefficient import DEFAULT_THRESHOLD, Coefficient, scheduled
from safereg_dist.config import Config
from safereg_dist.errors import ConfigError
from safereg_dist.objective import Objective
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Backend, PolicyEngine, ReferenceEngine
from safereg_dist.parallel.shards import read_architecture, weights_fingerprint
from safereg_dist.policy import Policy, enable_activation_checkpointing
from safereg_dist.reference import NoReference, Packing, Reference, ReferenceTrunk
from safereg_dist.reference.store import ReferenceStore, StoreIdentity
from safereg_dist.risk.override import read_overrides
from safereg_dist.risk.stage import RiskStage
from safereg_dist.signals import (
    Signal,
    build_risk,
    category_ceilings,
    check_overrides,
    check_templates,
    policy_layer,
    read_signals,
    reads_column,
    require_risk_column,
)
from safereg_dist.step import RegularizedStep

DEFAULT_STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSources:
    """The data of a run on one rank."""

    stream: RowStream
    train: RowStore
    anchor: RowStore | None
    validation: RowStream | None
    validation_rows: int
    total_steps: int
    rows_per_step: int
    """Rows of this rank in one optimizer step."""

    @property
    def content_hashes(self) -> list[str]:
        """Of the training rows and, where there are any, the anchor rows."""
        return [store.content_hash for store in (self.train, self.anchor) if store is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that `train` drives."""

    config: Config
    ranks: Ranks
    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    sources: RowSources
    model: PreTrainedModel
    step: RegularizedStep
    engine: PolicyEngine
    pad_id: int
    fingerprints: dict[str, str]
    """Weight fingerprints at the start, of `policy` and `reference`."""


def start_backend(config: Config) -> Backend:
    """The backend that `engine.name` asks for, with its ranks joined. Collectives: rendezvous."""
    if config.engine.name == "single":
        from safereg_dist.parallel.single import SingleBackend, single_ranks

        return SingleBackend(single_ranks())
    from safereg_dist.parallel.deepspeed import DeepSpeedBackend, start_ranks

    return DeepSpeedBackend(start_ranks(config.engine))


def build_run(config: Config, backend: Backend) -> Run:
    """All objects of a run, models loaded and wrapped.

    Raises:
        ConfigError, DataError, ProbeError, CriticUnavailable: what the configuration names is
            missing or does not fit.
    Collectives: those of loading and wrapping; every rank calls it.
    """
    ranks = backend.ranks
    torch.manual_seed(config.train.seed + ranks.rank)  # dropout differs between ranks
    policy_folder, tokenizer, sources, signals = _read_inputs(config, ranks)

    precision = config.train.precision
    model = backend.load_model(
        policy_folder,
        precision=precision,
        offload=config.engine.offload_params,
        hpz_partition_size=config.engine.hpz_partition_size,
    )
    with ranks.together():
        _check_tokenizer(tokenizer, model)
        if config.train.activation_checkpointing:
            enable_activation_checkpointing(model)
        _require_finite(backend, model, policy_folder)
    fingerprints = {"policy": backend.fingerprint(model)}
    reference = _build_reference(
        config, backend, policy_folder, model, tokenizer, sources, fingerprints
    )

    with ranks.together():
        risk = build_risk(config, signals, backend, reference, model, fingerprints)
        policy = Policy(model, probed_layer=policy_layer(config, signals))
        step = RegularizedStep(
            policy,
            risk=risk,
            coefficient=Coefficient(
                config.regularizer,
                threshold=risk.threshold,
                ranks=ranks,
                ceilings=category_ceilings(signals),
            ),
            reference=reference,
            objective=Objective(config.regularizer, chunk_tokens=config.train.chunk_tokens),
        )
    step.train()
    engine = backend.wrap_policy(step, config=config)
    return Run(
        config=config,
        ranks=ranks,
        backend=backend,
        tokenizer=tokenizer,
        sources=sources,
        model=model,
        step=step,
        engine=engine,
        pad_id=_pad_id(tokenizer),
        fingerprints=fingerprints,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """What is needed to know the risk of rows, without anything that trains."""

    config: Config
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase
    sources: RowSources
    reference: Reference | NoReference
    fingerprints: dict[str, str]
    """The weight fingerprint of `reference`, where there is one."""
    risk: RiskStage
    threshold: float
    pad_id: int
    probed_share: float
    """(k / L): layers that the deepest probe reads, of the reference's; 0 without a probe."""
    ceilings: dict[str, float]
    """The largest coefficient of each category that has one of its own."""


def build_screening(config: Config, backend: Backend, *, with_reference: bool = False) -> Screening:
    """The data and the risk stage of a run; a reference where a probe reads it or it is asked for.

    Raises:
        ConfigError, DataError, ProbeError, CriticUnavailable: as `build_run` does.
    Collectives: those of loading; every rank calls it.
    """
    ranks = backend.ranks
    folder, tokenizer, sources, signals = _read_inputs(config, ranks)
    fingerprints: dict[str, str] = {}
    reference: Reference | NoReference = NoReference()
    depths = [signal.probe.layer for signal in signals if signal.probe is not None]
    num_layers = 1
    if depths or with_reference:
        reference = _build_reference(
            config, backend, folder, None, tokenizer, sources, fingerprints
        )
    if isinstance(reference, Reference):
        num_layers = reference.config.num_hidden_layers
    with ranks.together():
        risk = build_risk(config, signals, backend, reference, None, fingerprints)
    own = config.regularizer.threshold
    return Screening(
        config=config,
        ranks=ranks,
        tokenizer=tokenizer,
        sources=sources,
        reference=reference,
        fingerprints=fingerprints,
        risk=risk,
        threshold=risk.threshold if own is None else own,
        pad_id=_pad_id(tokenizer),
        probed_share=max(depths, default=0) / num_layers,
        ceilings=category_ceilings(signals),
    )


def _read_inputs(
    config: Config, ranks: Ranks
) -> tuple[Path, PreTrainedTokenizerBase, RowSources, list[Signal]]:
    """The model's folder, its tokenizer, the rows and the signals: all that is read before weights.

    Collectives: gathers of texts.
    """
    folder = resolve_model(config.model, ranks)
    with ranks.together():
        tokenizer = load_tokenizer(str(folder), config.data)
    sources = build_sources(config, tokenizer, ranks)
    signals = read_signals(config, ranks)
    with ranks.together():
        check_templates(signals, tokenizer)
    return folder, tokenizer, sources, signals


def resolve_model(model: str, ranks: Ranks) -> Path:
    """Local folder of a path or hub id; the first rank of each node downloads.

    Raises:
        ConfigError: neither a folder nor a hub id that can be fetched.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with ranks.main_first():
        try:
            patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            return Path(snapshot_download(model, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
            raise ConfigError(
                f"model {model!r} is neither a local folder nor a hub id that can be fetched "
                f"({' '.join(str(err).split())[:200]}): check the path"
            ) from err


def build_sources(config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> RowSources:
    """Training, anchor and validation rows of this rank.

    Raises:
        DataError: a file or row that cannot be used, or a missing risk column.
    Collectives: gathers of texts.
    """
    data, train = config.data, config.train

    def load(path: str) -> RowStore:
        with ranks.main_first():
            return load_rows(path, tokenizer, data, progress=ranks.is_main)

    train_rows = load(data.train)
    anchor_rows = load(data.anchor) if data.anchor is not None else None
    validation = load(data.validation) if data.validation is not None else None
    with ranks.together():
        if config.needs_risk and reads_column(config.risk):
            require_risk_column(train_rows, data.train)
        if config.needs_risk and config.risk.override is not None:
            check_overrides(config.risk.override, train_rows, data.train, is_main=ranks.is_main)

        active = _known_active_rows(config, train_rows)

    rows_per_step = train.micro_batch_size * train.grad_accum_steps
    total_steps = train.steps or DEFAULT_STEPS
    fraction = data.anchor_fraction if anchor_rows is not None else 0.0
    if train.epochs is not None:
        total_steps = steps_for(
            train_rows,
            epochs=train.epochs,
            world_size=ranks.world_size,
            rows_per_step=rows_per_step,
            anchor_fraction=fraction,
        )

    def stream(
        rows: RowStore,
        anchor: RowStore | None,
        epochs: float | None,
        name: str,
        active: np.ndarray | None = None,
    ) -> RowStream:
        return RowStream(
            rows,
            anchor,
            anchor_fraction=data.anchor_fraction,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=train.seed,
            epochs=epochs,
            name=name,
            active=active,
        )

    with ranks.together():
        return RowSources(
            stream=stream(train_rows, anchor_rows, train.epochs, "data.train", active),
            train=train_rows,
            anchor=anchor_rows,
            validation=None
            if validation is None
            else stream(validation, None, 1.0, "data.validation"),
            validation_rows=0 if validation is None else len(validation),
            total_steps=total_steps,
            rows_per_step=rows_per_step,
        )


def _known_active_rows(config: Config, rows: RowStore) -> np.ndarray | None:
    """bool [rows], rows with b > 0, where that is known now and they are to be dealt evenly."""
    is_column = config.needs_risk and config.risk.estimator == "column"
    if not is_column or config.reference.balance not in ("auto", "deal"):
        return None
    if config.regularizer.granularity == "batch":
        return None  # a row's coefficient depends on the rows beside it
    risk = np.asarray(rows.table.data.column("risk")).copy()
    if config.risk.override is not None:
        decisions = read_overrides(config.risk.override)
        for index, name in enumerate(rows.table["id"]):
            if name in decisions:
                risk[index] = decisions[name].risk
    threshold = config.regularizer.threshold
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    values, places = np.unique(risk, return_inverse=True)
    active = [scheduled(value, config.regularizer, threshold) > 0 for value in values.tolist()]
    return np.array(active)[places]


def _require_finite(backend: Backend, model: PreTrainedModel, folder: Path) -> None:
    name = backend.first_not_finite(model)
    if name is not None:
        raise ConfigError(
            f"the weights in {folder} are not finite (in {name}): every state and loss would be "
            "nan; save or download the model again"
        )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)  # `load_tokenizer` has seen to it
    return pad_id


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    vocab = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocab:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {vocab} embeddings: "
            "they do not belong together"
        )


def _build_reference(
    config: Config,
    backend: Backend,
    policy_folder: Path,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    sources: RowSources,
    fingerprints: dict[str, str],
) -> Reference | NoReference:
    """The reference; held against the policy, where there is one."""
    if not config.needs_reference:
        return NoReference()
    ranks, settings = backend.ranks, config.reference
    folder = resolve_model(settings.model or str(policy_folder), ranks)
    with ranks.together():
        architecture = read_architecture(folder)
        if policy is not None:
            _check_same_vocabulary(architecture, policy, folder, policy_folder, tokenizer, config)
    is_same = policy is not None and folder.resolve() == policy_folder.resolve()
    if settings.cache is not None and policy is not None:
        fingerprints["reference"] = (
            fingerprints["policy"] if is_same else weights_fingerprint(folder, ranks)
        )
        return _stored_reference(
            config, backend, folder, architecture, tokenizer, sources, fingerprints
        )
    model = _load_reference(config, backend, folder)
    fingerprints["reference"] = backend.fingerprint(model)
    with ranks.together():
        if is_same and fingerprints["reference"] != fingerprints["policy"]:
            raise ConfigError(
                f"policy and reference were both loaded from {folder}, but their weights differ "
                f"(fingerprints {fingerprints['policy'][:12]} and "
                f"{fingerprints['reference'][:12]}): loading has lost weights; report this"
            )
    return Reference.of_model(
        model, backend=backend, offload=settings.offload, packing=_packing(config)
    )


def _load_reference(config: Config, backend: Backend, folder: Path) -> PreTrainedModel:
    model = backend.load_model(
        folder, precision=config.train.precision, offload=config.reference.offload
    )
    with backend.ranks.together():
        _require_finite(backend, model, folder)
    return model


def _stored_reference(
    config: Config,
    backend: Backend,
    folder: Path,
    architecture: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: RowSources,
    fingerprints: dict[str, str],
) -> Reference:
    """A reference of which the head alone is loaded; its trunk on the first row not in store."""
    ranks, settings = backend.ranks, config.reference
    assert settings.cache is not None
    with ranks.together():
        identity = StoreIdentity.of(
            fingerprints["reference"],
            tokenizer,
            sources.content_hashes,
            precision=config.train.precision,
        )
        store = ReferenceStore.open(Path(settings.cache), identity)

    def load_trunk() -> ReferenceEngine:
        if ranks.is_main:
            print(
                f"safereg: a row is not in reference.cache={settings.cache} (or a probe reads the "
                "reference): loading its trunk",
                file=sys.stderr,
                flush=True,
            )
        trunk = ReferenceTrunk(_load_reference(config, backend, folder))
        return backend.wrap_reference(
            trunk, offload=settings.offload, rows=_packing(config).rows_per_pass
        )

    return Reference(
        architecture,
        backend.load_head(folder, precision=config.train.precision),
        load_trunk,
        backend=backend,
        packing=_packing(config),
        store=store,
    )


def _packing(config: Config) -> Packing:
    settings = config.reference
    return Packing(
        rows_per_pass=settings.rows_per_pass or config.train.micro_batch_size,
        keep_bytes=settings.keep_bytes,
        max_length=config.data.max_length,
        exchange=settings.balance == "exchange",
    )


def _check_same_vocabulary(
    reference: PreTrainedConfig,
    policy: PreTrainedModel,
    folder: Path,
    policy_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> None:
    sizes = [c.get_text_config().vocab_size for c in (reference, policy.config)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the reference {folder} has vocabulary {sizes[0]}, the policy {policy_folder} "
            f"{sizes[1]}: the divergence compares them token by token, choose a reference with "
            "the same (padded) vocabulary"
        )
    if folder.resolve() == policy_folder.resolve():
        return
    if load_tokenizer(str(folder), config.data).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the tokenizers of the reference {folder} and the policy {policy_folder} give tokens "
            "different numbers: choose a reference with the same tokenizer"
        )
