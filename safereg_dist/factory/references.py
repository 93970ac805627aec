"""The frozen reference of a run: loaded whole, or its head beside states that are stored."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.config import Config, DataConfig
from safereg_dist.data import load_tokenizer
from safereg_dist.errors import ConfigError
from safereg_dist.factory.model_folder import resolve_model
from safereg_dist.models.adapters import AdapterValues, add_adapters
from safereg_dist.models.architecture import read_architecture
from safereg_dist.models.stored_adapter import read_frozen
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Adapt, Backend, ReferenceEngine
from safereg_dist.parallel.shards import weights_fingerprint
from safereg_dist.parallel.single import SingleBackend
from safereg_dist.policy import Policy
from safereg_dist.reference import (
    EngineModel,
    Exchange,
    NoReference,
    Packing,
    Reference,
    ReferenceTrunk,
)
from safereg_dist.reference.adapters_off import AdaptersOff
from safereg_dist.reference.exchange import slowest_rates
from safereg_dist.reference.store import ReferenceStore, StoreIdentity, read_index
from safereg_dist.reference.trunk import used_parameters
from safereg_dist.storage.signing import signing_key


class WeightsFacts(NamedTuple):
    """The fingerprint and the configuration of a model."""

    fingerprint: str
    config: PreTrainedConfig
    """The configuration of the text model."""
    adapter: str | None = None
    """The adapter that is on in it, besides its own weights."""


class BuiltReference(NamedTuple):
    """A reference, and the facts of its weights if it has any."""

    reference: Reference | NoReference
    facts: WeightsFacts | None


class LoadedPolicy(NamedTuple):
    """The policy that the reference is checked against."""

    folder: Path
    policy: Policy
    fingerprint: str
    """Of its weights before training, without adapters but `reference.adapter`."""


def build_reference(
    config: Config,
    backend: Backend,
    policy_folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    content_hashes: list[str],
    policy: LoadedPolicy | None = None,
) -> BuiltReference:
    """Builds the reference of a run, and checks it against the policy if that is loaded.

    `content_hashes` identify the rows that a stored reference must belong to.
    """
    if not config.needs_reference:
        return BuiltReference(NoReference(), None)
    ranks, settings = backend.ranks, config.reference
    folder = resolve_model(settings.model or str(policy_folder), ranks)
    with ranks.together():
        _check_adapters(config)
        architecture = read_architecture(folder)
        if policy is not None:
            is_same = folder.resolve() == policy.folder.resolve()
            check_same_tokens(
                architecture,
                policy.policy.model.config,
                names=(str(folder), str(policy.folder)),
                tokenizer=None if is_same else tokenizer,
                data=config.data,
            )
    if config.has_adapters_off and policy is not None:
        return _adapters_off(config, backend, policy)
    if settings.engine in ("fsdp2", "zero3", "whole"):
        backend = reference_backend(settings.engine, ranks)
    elif config.engine.is_replicated and ranks.world_size > 1:
        backend = reference_backend("fsdp2", ranks)  # nobody needs a second whole model
    is_same = policy is not None and folder.resolve() == policy.folder.resolve()
    adapter = settings.adapter
    if settings.cache is not None and policy is not None:
        fingerprint = policy.fingerprint if is_same else weights_fingerprint(folder, ranks)
        facts = WeightsFacts(fingerprint, architecture.get_text_config(), adapter)
        identity = StoreIdentity.of(
            fingerprint, tokenizer, content_hashes, precision=config.train.precision
        )
        return BuiltReference(_stored_reference(config, backend, folder, identity), facts)
    model = _load_reference(config, backend, folder)
    fingerprint = backend.fingerprint(model, adapters_of(config))
    facts = WeightsFacts(fingerprint, model.config.get_text_config(), adapter)
    with ranks.together():
        if is_same and policy is not None and facts.fingerprint != policy.fingerprint:
            raise ConfigError(
                f"policy and reference were both loaded from {folder}, but their weights differ "
                f"(fingerprints {policy.fingerprint[:12]} and {facts.fingerprint[:12]}): loading "
                "has lost weights; report this"
            )
    return BuiltReference(_loaded_reference(config, backend, model), facts)


def _check_adapters(config: Config) -> None:
    """Raises ConfigError where the reference needs adapters that the run does not have."""
    if config.reference.adapter is not None and config.lora is None:
        raise ConfigError(
            f"reference.adapter={config.reference.adapter!r} is an adapter of lora.frozen, but "
            "lora is null: name its folder there, or set reference.adapter=null"
        )
    if config.reference.engine == "adapters_off" and config.lora is None:
        raise ConfigError(
            "reference.engine=adapters_off takes the policy without its adapters, but lora is "
            "null: give lora a section, or set reference.engine=auto"
        )


def reference_backend(engine: str, ranks: Ranks) -> Backend:
    """The backend that loads and runs a reference by `reference.engine`.

    Raises:
        ConfigError: shards for a process that is alone.
    """
    if engine not in ("fsdp2", "zero3"):
        return SingleBackend(ranks)
    if ranks.dp_group is None:
        raise ConfigError(
            f"reference.engine={engine} shards the reference over ranks, but this process is "
            "alone: set reference.engine=auto"
        )
    if engine == "fsdp2":
        from safereg_dist.parallel.fsdp2 import Fsdp2Backend

        return Fsdp2Backend(ranks)
    from safereg_dist.parallel.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(ranks)


def _adapters_off(config: Config, backend: Backend, policy: LoadedPolicy) -> BuiltReference:
    """The policy itself; its engine is bound once it wraps the model."""
    model = policy.policy.model
    own = AdaptersOff(
        model, policy.policy, adapter=config.reference.adapter, gathered=backend.gathered
    )
    reference = Reference(own, ranks=backend.ranks, packing=packing_of(config))
    adapter = config.reference.adapter
    facts = WeightsFacts(policy.fingerprint, model.config.get_text_config(), adapter)
    return BuiltReference(reference, facts)


def _loaded_reference(config: Config, backend: Backend, model: PreTrainedModel) -> Reference:
    packing = packing_of(config)
    own = EngineModel.of_model(
        model, backend=backend, offload=config.reference.offload, rows=packing.rows_per_pass
    )
    exchange = None
    if config.reference.balance == "exchange":
        exchange = Exchange(
            ranks=backend.ranks,
            rates=slowest_rates(backend.ranks),
            trunk_parameters=used_parameters(model),
            head=own.head,
            rows_per_pass=packing.rows_per_pass,
        )
    return Reference(own, ranks=backend.ranks, packing=packing, exchange=exchange)


def _stored_reference(
    config: Config, backend: Backend, folder: Path, identity: StoreIdentity
) -> Reference:
    """A reference with only its head loaded; loads the trunk for the first row not in store."""
    ranks, settings = backend.ranks, config.reference
    assert settings.cache is not None
    cache, index = Path(settings.cache), ""
    with ranks.together():
        if ranks.is_main:  # where the key is
            index = read_index(cache, signing_key(config.signing))
    index = ranks.from_main(index)
    with ranks.together():
        store = ReferenceStore.open(cache, identity, index=index)

    def load_trunk() -> ReferenceEngine:
        if ranks.is_main:
            print(
                f"safereg: a row is not in reference.cache={settings.cache} (or a probe reads the "
                "reference): loading its trunk",
                file=sys.stderr,
                flush=True,
            )
        model = _load_reference(config, backend, folder)
        found = backend.fingerprint(model, adapters_of(config))
        with ranks.together():
            if found != identity.reference:
                raise ConfigError(
                    f"the weights in {folder} have changed since this run began (fingerprint "
                    f"{found[:12]}, then {identity.reference[:12]}): put them back"
                )
        trunk = ReferenceTrunk(model)
        return backend.wrap_reference(
            trunk, offload=settings.offload, rows=packing_of(config).rows_per_pass
        )

    with _own_randomness(ranks.device):
        head = backend.load_head(folder, precision=config.train.precision)
    return Reference(
        EngineModel(head, load_trunk, backend=backend),
        ranks=ranks,
        packing=packing_of(config),
        store=store,
    )


def _load_reference(config: Config, backend: Backend, folder: Path) -> PreTrainedModel:
    # Building a model draws random weights first. Dropout must not depend on whether, and when,
    # that happens: a stored reference is loaded late or never.
    with _own_randomness(backend.ranks.device):
        model = backend.load_model(
            folder,
            precision=config.train.precision,
            offload=config.reference.offload,
            adapt=_own_adapter(config, backend.ranks),
        )
    with backend.ranks.together():
        require_finite(backend, model, folder)
    return model


def adapters_of(config: Config) -> tuple[str, ...]:
    """The adapters that are on in the reference: `reference.adapter`, or none."""
    return () if config.reference.adapter is None else (config.reference.adapter,)


def _own_adapter(config: Config, ranks: Ranks) -> Adapt | None:
    """What puts `reference.adapter` into a reference that is a model of its own."""
    if config.reference.adapter is None or config.lora is None:
        return None
    with ranks.together():
        stored = [s for s in read_frozen(config.lora) if s.name == config.reference.adapter]

    def adapt(model: PreTrainedModel) -> AdapterValues:
        add_adapters(model, None, stored)
        return AdapterValues(None, seed=config.train.seed, frozen=stored)

    return adapt


def _own_randomness(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def packing_of(config: Config) -> Packing:
    """How rows are packed into the reference's passes."""
    settings = config.reference
    return Packing(
        rows_per_pass=settings.rows_per_pass or config.train.micro_batch_size,
        keep_bytes=settings.keep_bytes,
        max_length=config.data.max_length,
    )


def require_finite(backend: Backend, model: PreTrainedModel, folder: Path) -> None:
    """Raises ConfigError where a weight on this rank is not finite. Collectives: none."""
    name = backend.first_not_finite(model)
    if name is not None:
        raise ConfigError(
            f"the weights in {folder} are not finite (in {name}): every state and loss would be "
            "nan; save or download the model again"
        )


def check_same_tokens(
    reference: PreTrainedConfig,
    policy: PreTrainedConfig,
    *,
    names: tuple[str, str],
    tokenizer: PreTrainedTokenizerBase | None,
    data: DataConfig,
) -> None:
    """Raises ConfigError where reference and policy give tokens different numbers.

    `names` are the reference's folder and the policy, for messages; `tokenizer` is the policy's,
    None where it is not to be compared with the folder's.
    """
    sizes = [config.get_text_config().vocab_size for config in (reference, policy)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the reference {names[0]} has vocabulary {sizes[0]}, the policy {names[1]} "
            f"{sizes[1]}: the divergence compares them token by token, choose a reference with "
            "the same (padded) vocabulary"
        )
    if tokenizer is None:
        return
    if load_tokenizer(names[0], data).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the tokenizers of the reference {names[0]} and the policy {names[1]} give tokens "
            "different numbers: choose a reference with the same tokenizer"
        )
