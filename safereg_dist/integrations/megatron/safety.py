"""Megatron-core: two lines around `model_provider` and `forward_step`; their bodies stay.

    safety = MegatronSafety("safety.yaml", output_dir="run")
    model_provider = safety.model_provider(model_provider)
    forward_step = safety.forward_step(forward_step)
    pretrain(..., model_provider, ..., forward_step, ...)

A step: the rows of all micro-batches are read ahead, their risk and coefficients found, and ranks
agree on the micro-batches that have a risky row. The frozen reference, in the policy's layout, runs
forward-only through the same schedule on those alone; its last hidden states stay on the last
stage. Then the policy's own schedule runs. In a micro-batch with a risky row the output layer hands
its input to the fused loss; all others train as they would without this.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from safereg_dist.config import Config
from safereg_dist.errors import ConfigError
from safereg_dist.factory.prepare import assemble, config_of, read_settings
from safereg_dist.factory.references import BuiltReference, reference_backend
from safereg_dist.factory.risk import build_risk, configured_overrides
from safereg_dist.factory.risk_specs import SourceSpec, read_sources
from safereg_dist.integrations.megatron.agreement import AgreedReference
from safereg_dist.integrations.megatron.checks import check_arguments, check_config, check_probes
from safereg_dist.integrations.megatron.probes import ProbeReader, Probes
from safereg_dist.integrations.megatron.read_ahead import ReadAhead
from safereg_dist.integrations.megatron.step import Pass, Replica
from safereg_dist.integrations.megatron.stored import StoredStates, reference_identity
from safereg_dist.integrations.recorder import Recorder
from safereg_dist.integrations.state import STATE
from safereg_dist.parallel.comm import capture
from safereg_dist.parallel.megatron import (
    MARK,
    Layout,
    innermost,
    listed,
    read_checkpoint,
    same_random_numbers,
    watch_schedules,
)
from safereg_dist.parallel.megatron_model import PipelinedReference
from safereg_dist.reference import NoReference
from safereg_dist.risk.probe_risk import CachedProbeRisk, LaggedProbeRisk


class MegatronSafety:
    """The safety of one Megatron run. All ranks make it and wrap with it alike."""

    def __init__(
        self,
        settings: str | Path | Mapping[str, Any],
        *,
        output_dir: str | Path,
        load_reference: Callable[[list[nn.Module]], None] | None = None,
        read_item: Callable[[Any], Mapping[str, Any]] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Nothing is built before the first step.

        Args:
            settings: the sections `reference`, `risk` and `regularizer` (see `prepare`); a file or
                a mapping. `reference.model` is a folder of `dist_checkpointing`.
            output_dir: where `metrics.jsonl` and the ledger go.
            load_reference: fills the reference's chunks in place of `reference.model`; with
                neither it is the policy as it is at the first step.
            read_item: an item of the data iterator as `batch_of_stream` expects it.
            tokenizer: for risk that is found by text.
        Raises:
            ConfigError: settings that do not fit.
        """
        self._settings = read_settings(settings)
        self.config: Config = config_of(self._settings, model="-")
        check_config(self.config)
        self._output_dir = Path(output_dir)
        self._load_reference = load_reference
        self._read_item = read_item or (lambda item: item)
        self._tokenizer = tokenizer
        self._provider: Callable[..., nn.Module] | None = None
        self._given: Sequence[nn.Module] | Callable[[], Sequence[nn.Module]] = ()
        self._calls_of_provider: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._run: Replica | None = None
        self._loaded: Path | None = None
        self.step = 0
        """Optimizer steps so far."""

    # ---- the two lines

    def model_provider(self, provider: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """The provider, whose calls are kept: the reference is built by the same ones."""
        self._provider = provider

        @functools.wraps(provider)
        def provide(*args: Any, **kwargs: Any) -> nn.Module:
            self._calls_of_provider.append((args, kwargs))
            return provider(*args, **kwargs)

        return provide

    def attach(
        self, reference: Sequence[nn.Module] | Callable[[], Sequence[nn.Module]]
    ) -> "MegatronSafety":
        """For scripts that build their own chunks: this rank's chunks of the reference, in order.

        They need the policy's layout, and hold its weights unless `load_reference` or
        `reference.model` fills them.
        """
        self._given = reference
        return self

    def forward_step(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """The forward step, around whose training schedules the step's other stages run."""
        watch_schedules()

        @functools.wraps(forward_step)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            if self._run is None or not self._run.is_training:
                return forward_step(*args, **kwargs)
            model = next(given for given in args if isinstance(given, nn.Module))
            with self._run.micro_batch(model) as report:
                output, loss_func = forward_step(*args, **kwargs)
            return output, report(loss_func)

        def around(schedule: Callable[..., Any], arguments: dict[str, Any]) -> Any:
            if arguments.get("forward_only", False):
                return schedule(**arguments)
            # As the schedule was given it, with what its loop has bound to it.
            return self._train(schedule, arguments, arguments["forward_step_func"])

        setattr(stepping, MARK, around)
        return stepping

    # ---- state

    def save(self, folder: str | Path) -> None:
        """Writes the regulariser's state to `folder/safereg`; all ranks call it.

        The folder may be that of Megatron's own checkpoint, whose files are not looked at.

        Raises:
            CheckpointError: it cannot be written, on all ranks.
        Collectives: gathers of texts.
        """
        assert self._run is not None, "there is nothing to save before the first step"
        run = self._run
        world, error = run.layout.world, None
        if run.recorder is not None:
            error = capture(run.recorder.save, Path(folder, STATE), step=self.step).error
        world.raise_together(error)

    def load(self, folder: str | Path, *, step: int) -> None:
        """Goes on from what `save` wrote after `step` optimizer steps; before the first one."""
        own = Path(folder, STATE)
        # In version 0.1 the folder itself held the state.
        self._loaded, self.step = own if own.is_dir() else Path(folder), step

    def finish(self) -> None:
        """Ends the logs. All ranks call it after the last step.

        Collectives: gathers of texts.
        """
        if self._run is None:
            return
        run, error = self._run, self._run.failed
        if run.stored is not None:
            error = error or capture(run.stored.flush).error
        run.layout.world.raise_together(error)
        if run.recorder is not None:
            recorder = run.recorder
            error = capture(lambda: recorder.finish(self.step)).error
        run.layout.world.raise_together(error)

    # ---- one step

    def _train(
        self, schedule: Callable[..., Any], arguments: dict[str, Any], forward_step: Any
    ) -> Any:
        run = self._run = self._run or self._start(arguments)
        inputs = Pass(schedule, arguments, forward_step, ReadAhead(arguments, self._read_item))
        plan = run.plan(inputs, self.step)
        run.run_reference(plan, inputs)
        with run.training(plan):
            result = schedule(**arguments | {"data_iterator": inputs.data.replayed()})
        run.close(plan)
        self.step += 1
        return result

    def _start(self, arguments: dict[str, Any]) -> Replica:
        """Builds what the steps need; by all ranks together, in the first of them."""
        layout = Layout.current()
        with layout.world.together():
            check_arguments(arguments)
        chunks = listed(arguments["model"])
        specs = read_sources(self.config, layout.world, self._tokenizer)
        with layout.world.together():
            check_probes(specs, chunks, self.config)
        run = Replica(self.config, layout, chunks)
        if self.config.needs_reference:
            with layout.world.together():
                built = self._build_reference(chunks)
                run.reference = PipelinedReference(built)
            self._fill_reference(chunks, built, layout)
        self._start_probes(run, specs)
        self._start_store(run)
        error = None
        if layout.is_owner:
            error = capture(self._start_owner, run, specs).error
        layout.world.raise_together(error)
        return run

    def _start_probes(self, run: Replica, specs: list[SourceSpec]) -> None:
        """Collectives: those of each `ProbeReader`."""
        probes = [spec.probe for spec in specs if spec.probe is not None]
        if not probes:
            return
        assert run.reference is not None
        chunks = run.chunks if run.reads_policy else run.reference.chunks
        how: Any = innermost(chunks[0]).config
        readers = [
            ProbeReader(
                probe,
                chunks,
                run.layout,
                is_spread=bool(how.sequence_parallel),
                current=run.current,
            )
            for probe in probes
        ]
        run.probes = Probes(readers, run.layout)

    def _start_store(self, run: Replica) -> None:
        """Collectives: with `reference.cache` a gather of 32 bytes, and of texts."""
        folder, reference = self.config.reference.cache, run.reference
        if folder is None or reference is None:
            return
        identity = reference_identity(reference.chunks, run.layout.world)
        with run.layout.world.together():
            if reference.output is not None:
                spread = reference.output.sequence_parallel
                how = {"identity": identity, "is_spread": spread}
                run.stored = StoredStates(Path(folder), run.layout, **how)

    def _start_owner(self, run: Replica, specs: list[SourceSpec]) -> None:
        ranks = run.layout.data
        learn = LaggedProbeRisk if run.reads_policy else CachedProbeRisk
        sources = [learn(spec.probe) for spec in specs if spec.probe is not None]
        if run.probes is not None:
            run.probes.sources = sources  # type: ignore[assignment]
        of_probes = iter(sources)
        risk = build_risk(
            self.config,
            specs,
            reference_backend("whole", ranks),
            BuiltReference(NoReference(), None),
            overrides=configured_overrides(self.config),
            tokenizer=self._tokenizer,
            probe_risk=lambda _: next(of_probes),
        )
        run.regularizer = assemble(
            self.config,
            None,
            specs=specs,
            risk=risk,
            reference=AgreedReference(
                run.layout, risk, None if run.stored is None else run.find_stored
            ),
            ranks=ranks,
        )
        run.recorder = Recorder(
            run.regularizer, self._output_dir, self._settings, self.config.signing
        )
        run.recorder.start(self._loaded, step=self.step)

    def _build_reference(self, policy: Sequence[nn.Module]) -> list[nn.Module]:
        given = self._given
        if self._provider is None and not given:
            raise ConfigError(
                "there is no reference: wrap `model_provider`, or give `attach` its chunks"
            )
        with same_random_numbers():
            if given or self._provider is None:
                found = list(given() if callable(given) else given)
            else:
                calls = self._calls_of_provider[: len(policy)]
                found = [self._provider(*args, **kwargs) for args, kwargs in calls]
        if len(found) != len(policy):
            raise ConfigError(
                f"the reference has {len(found)} chunks on this rank, the policy {len(policy)}: "
                "both need the same layout"
            )
        for own, other in zip(policy, found, strict=True):
            first = next(innermost(own).parameters())
            other.to(device=first.device, dtype=first.dtype)
            _check_same_shapes(innermost(own), other)
        return found

    def _fill_reference(
        self, policy: Sequence[nn.Module], reference: list[nn.Module], layout: Layout
    ) -> None:
        """Gives the reference its weights. Collectives: those of a checkpoint's reading."""
        folder = self.config.reference.model
        with layout.world.together():
            if folder is None and self._load_reference is None and self.step > 0:
                raise ConfigError(
                    f"the run goes on at step {self.step}, and the policy is no longer the model "
                    "that it began with: name that in reference.model, or give `load_reference`"
                )
        if self._load_reference is not None:
            self._load_reference(reference)
        elif folder is not None:
            read_checkpoint(Path(folder), reference, layout.world)
        else:
            for own, other in zip(policy, reference, strict=True):
                state = {k: v for k, v in innermost(own).state_dict().items() if v is not None}
                other.load_state_dict(state, strict=False)


def _check_same_shapes(policy: nn.Module, reference: nn.Module) -> None:
    other = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        found = other.get(name)
        if found is None or found.shape != parameter.shape:
            raise ConfigError(
                f"{name} has the shape {tuple(parameter.shape)} in the policy and "
                f"{None if found is None else tuple(found.shape)} in the reference: both need the "
                "same architecture, layout and padded vocabulary"
            )
