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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safereg_dist.config import Config
from safereg_dist.data.stream import batch_of_stream
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.factory.prepare import assemble, config_of, objective_of, read_settings
from safereg_dist.factory.references import BuiltReference, reference_backend
from safereg_dist.factory.risk import build_risk, configured_overrides, read_sources
from safereg_dist.integrations.megatron_checks import check_arguments, check_config
from safereg_dist.integrations.recorder import Recorder
from safereg_dist.parallel.comm import Agreement, Result, capture
from safereg_dist.parallel.megatron import (
    MARK,
    CallRecorder,
    Layout,
    OutputLayer,
    PipelinedReference,
    innermost,
    read_checkpoint,
    same_random_numbers,
    watch_schedules,
    whole_sequence,
)
from safereg_dist.reference import NoReference
from safereg_dist.reference.reference import ReferenceSchedule, schedule_rows
from safereg_dist.risk.stage import RiskStage
from safereg_dist.step import SafetyRegularizer, StepPlan
from safereg_dist.types import Head, Loss, MicroBatch, MicroBatchResult, Row, known_risk

_BITS = 60
"""Micro-batches whose flags one number of the agreement carries."""
_UNIT = 1 << 30
"""Sums of risk and coefficients are agreed on as whole numbers of 1 / _UNIT."""
TASK, DIVERGENCE, MASK = 0, 1, 2
"""The weights of a token, in this order."""


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
        self._run: _Run | None = None
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
        """Writes the regulariser's state; all ranks call it, beside Megatron's own checkpoint.

        Raises:
            CheckpointError: it cannot be written, on all ranks.
        Collectives: gathers of texts.
        """
        assert self._run is not None, "there is nothing to save before the first step"
        run = self._run
        world, error = run.layout.world, None
        if run.recorder is not None:
            error = capture(run.recorder.save, Path(folder)).error
        world.raise_together(error)

    def load(self, folder: str | Path, *, step: int) -> None:
        """Goes on from what `save` wrote after `step` optimizer steps; before the first one."""
        self._loaded, self.step = Path(folder), step

    def finish(self) -> None:
        """Ends the logs. All ranks call it after the last step.

        Collectives: gathers of texts.
        """
        if self._run is None:
            return
        run, error = self._run, None
        if run.recorder is not None:
            error = run.failed or capture(run.recorder.finish).error
        run.layout.world.raise_together(error)

    # ---- one step

    def _train(
        self, schedule: Callable[..., Any], arguments: dict[str, Any], forward_step: Any
    ) -> Any:
        run = self._run = self._run or self._start(arguments)
        data = _ReadAhead(arguments)
        plan = run.plan(data, self._read_item, self.step)
        if plan.to_run:
            run.run_reference(plan, schedule, arguments, data, forward_step)
        arguments = arguments | {"data_iterator": data.replayed()}
        with run.training(plan):
            result = schedule(**arguments)
        run.close(plan)
        self.step += 1
        return result

    def _start(self, arguments: dict[str, Any]) -> "_Run":
        """Builds what the steps need; by all ranks together, in the first of them."""
        layout = Layout.current()
        with layout.world.together():
            check_arguments(arguments)
        chunks = _listed(arguments["model"])
        run = _Run(self.config, layout, chunks)
        if self.config.needs_reference:
            with layout.world.together():
                built = self._build_reference(chunks)
                run.reference = PipelinedReference(built)
            self._fill_reference(chunks, built, layout)
        error = None
        if layout.is_owner:
            error = capture(self._start_owner, run).error
        layout.world.raise_together(error)
        return run

    def _start_owner(self, run: "_Run") -> None:
        ranks = run.layout.data
        specs = read_sources(self.config, ranks)
        risk = build_risk(
            self.config,
            specs,
            reference_backend("whole", ranks),
            BuiltReference(NoReference(), None),
            overrides=configured_overrides(self.config),
            tokenizer=self._tokenizer,
        )
        run.regularizer = assemble(
            self.config,
            None,
            specs=specs,
            risk=risk,
            reference=_Agreed(run, risk),
            ranks=ranks,
        )
        run.recorder = Recorder(run.regularizer, self._output_dir, self._settings)
        run.recorder.start(self._loaded)

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


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What is decided of one step before its schedule."""

    batches: list[MicroBatch]
    """On the owner: the rows of each micro-batch."""
    owned: StepPlan | None
    """On the owner: their risk and coefficients."""
    active: list[int]
    """Micro-batches that hold an active row (b > 0) or an anchor of this replica."""
    to_run: list[int]
    """Micro-batches that the reference runs on: the active ones, and what a schedule needs more."""
    report: dict[str, tuple[float, float]]
    """(numerator, count) of what is known before the schedule, of this replica."""
    weights: Tensor | None = None
    """On the last stage: [len(active), 3, B, S] weights of the tokens, on the host."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """On the last stage: micro-batch -> the reference's [S, B, H]."""
    losses: dict[int, Tensor] = field(default_factory=dict)
    """On the last stage: micro-batch -> [2, B, S] cross-entropy and divergence of its tokens."""


class _Run:
    """A rank of a run: its layout, its chunks, and on an owner the regulariser and the logs."""

    def __init__(self, config: Config, layout: Layout, chunks: Sequence[nn.Module]) -> None:
        self.config = config
        self.layout = layout
        self.objective = objective_of(config)
        self.chunks = [innermost(chunk) for chunk in chunks]
        self.recorders = [CallRecorder(chunk) for chunk in self.chunks]
        last = self.chunks[-1]
        self.output = OutputLayer(last) if getattr(last, "post_process", False) else None
        self.reference: PipelinedReference | None = None
        self.regularizer: SafetyRegularizer | None = None
        self.recorder: Recorder | None = None
        self.failed: Exception | None = None
        """Why the owner could not close its last step; raised with the next agreement."""
        self._plan: _Plan | None = None
        self._next: list[int] = []

    @property
    def is_training(self) -> bool:
        """True inside a training schedule."""
        return self._plan is not None

    # ---- before the schedule

    def plan(self, data: "_ReadAhead", read_item: Callable[[Any], Any], step: int) -> _Plan:
        """Risk, coefficients, and the agreement on the micro-batches that the reference runs on.

        Raises:
            The first failed rank's error, on all ranks.
        Collectives: those of `SafetyRegularizer.open` over the owners; one MAX all-reduce of 8
        bytes for each data-parallel replica and 60 micro-batches, and 32 more for each; where a
        micro-batch of this replica is active, a broadcast of its tokens' weights from the owner
        over the tensor- and context-parallel ranks of the last stage.
        """
        count, batches, owned = data.count, [], None
        words, agreement = -(-count // _BITS), None
        read = capture(data.read)
        if self.regularizer is not None:
            batches = [_batch(read, read_item, i, data.shape, self.failed) for i in range(count)]
            owned = self.regularizer.open(batches, step=step)
            passes = owned.micro_batches[0].plan
            assert passes is not None
            agreement = passes.passes.agreement
        if agreement is None:
            agreement = self.agree(read.then(lambda _: [0] * (words + 4)), words)
        numbers = agreement.result()
        size = words + 4
        table = [numbers[i * size : (i + 1) * size] for i in range(self.layout.data.world_size)]
        own = table[self.layout.data.rank]
        active = _places(own[:words])
        to_run = _needed(active, [_places(row[:words]) for row in table], count, self.layout)
        risk, risk_rows, coef, rows = own[words:]
        plan = _Plan(
            batches=batches,
            owned=owned,
            active=active,
            to_run=to_run,
            report={
                "risk": (risk / _UNIT, float(risk_rows)),
                "kl_coef": (coef / _UNIT, float(rows)),
            },
        )
        if active and self.layout.is_last_stage:
            plan.weights = self._weights(plan, data.shape)
        return plan

    def agree(self, own: Result[list[int]], words: int) -> Agreement:
        """Starts the agreement over all ranks; only owners have other numbers than 0."""
        size, place = words + 4, self.layout.data.rank
        rest = self.layout.data.world_size - place - 1
        table = own.then(lambda numbers: [0] * size * place + numbers + [0] * size * rest)
        return self.layout.world.all_reduce_max_async(
            table, count=size * self.layout.data.world_size
        )

    def _weights(self, plan: _Plan, shape: tuple[int, int]) -> Tensor:
        """[len(active), 3, B, S / cp] on the host, the same on all ranks of the head's group.

        One host sync.
        """
        layout = self.layout
        own = torch.zeros(len(plan.active), 3, *shape, dtype=torch.float32)
        if plan.owned is not None:
            for place, index in enumerate(plan.active):
                batch, coef = plan.batches[index], _coefficients(plan.owned, index)
                task, divergence = self.objective.token_weights(batch, coef)
                flat = own[place].flatten(1)
                flat[TASK, batch.response_index] = task
                flat[DIVERGENCE, batch.response_index] = divergence
                flat[MASK, batch.response_index] = 1.0
        moved = layout.from_first_of_head(own.to(layout.world.device))
        return layout.own_tokens(moved).cpu()

    def run_reference(
        self,
        plan: _Plan,
        schedule: Callable[..., Any],
        arguments: dict[str, Any],
        data: "_ReadAhead",
        forward_step: Callable[..., Any],
    ) -> None:
        """The reference's states of the active micro-batches, on the last stage.

        Collectives: what `forward_step` runs before it calls its model, once more for each of these
        micro-batches; those of the schedule's forward.
        """
        if self.reference is None:
            return
        calls = [
            [
                recorder.call_in(lambda m=m, k=k: forward_step(data.one(k, m), data.chunks[k]))
                for m in plan.to_run
            ]
            for k, recorder in enumerate(self.recorders)
        ]
        states = self.reference.states(schedule, arguments, calls)
        budget = self.config.reference.keep_bytes
        for index, found in zip(plan.to_run, states, strict=False):
            if index not in plan.active:
                continue
            budget -= found.nbytes
            plan.states[index] = found if budget >= 0 else found.cpu()

    # ---- inside the schedule

    @contextmanager
    def training(self, plan: _Plan) -> Iterator[None]:
        """A block in which forward steps belong to the plan's micro-batches."""
        self._plan, self._next = plan, [0] * len(self.chunks)
        try:
            yield
        finally:
            self._plan = None

    @contextmanager
    def micro_batch(self, chunk: nn.Module) -> Iterator[Callable[[Any], Any]]:
        """A block with one forward of a chunk; gives what wraps its loss function."""
        plan = self._plan
        assert plan is not None
        place = next(k for k, own in enumerate(self.chunks) if own is innermost(chunk))
        index = self._next[place]
        self._next[place] += 1
        output = self.output if place == len(self.chunks) - 1 else None
        if output is None:
            yield lambda loss_func: loss_func
            return
        is_active = index in plan.active
        loss = functools.partial(self._loss, plan, index) if is_active else None
        with output.ending_in(loss):
            yield lambda loss_func: _with_report(loss_func, plan, index)
            if loss is None and output.last_losses is not None:
                ce = output.last_losses.float()
                plan.losses[index] = torch.stack([ce, torch.zeros_like(ce)])

    def _loss(
        self, plan: _Plan, index: int, hidden: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:
        """[B, S] of w CE + v D at each token; its gradient is that of their sum.

        The whole gradient hangs on one token, since the kernel has already computed it: right for a
        loss function that multiplies by the mask, sums, and scales the sum.
        """
        assert plan.weights is not None
        weights = plan.weights[plan.active.index(index)].flatten(1)
        chosen = weights[MASK].nonzero().squeeze(1)
        spread = self.output is not None and self.output.sequence_parallel
        states = whole_sequence(hidden, is_spread=spread, is_trained=True)
        flat = states.transpose(0, 1).flatten(0, 1)
        if not len(chosen):  # no token of this slice counts; the graph still reaches the states
            plan.losses[index] = labels.new_zeros(2, *labels.shape, dtype=torch.float32)
            return flat[:, :0].sum().float() + torch.zeros_like(labels, dtype=torch.float32)
        place = chosen.to(flat.device, non_blocking=True)
        found = self.objective.of_tokens(
            flat.index_select(0, place),
            Head(head, None, None, 1.0),  # type: ignore[arg-type]
            labels.flatten().index_select(0, place),
            weights[TASK][chosen],
            weights[DIVERGENCE][chosen],
            **self._reference_part(plan, index, place),
            tp_group=self.layout.tp_group,
            vocab_start=self.layout.tp_rank * head.shape[0],
            reduce_hidden_grad=not spread,
        )
        total, ce, divergence = found
        at = weights[:, chosen].to(flat.device, non_blocking=True)
        values = at[TASK] * ce + torch.where(at[DIVERGENCE] > 0, at[DIVERGENCE] * divergence, 0.0)
        hung = torch.zeros_like(values)
        hung[0] = 1.0
        values = values.detach() + hung * (total - total.detach())
        both = torch.stack([ce, divergence]).float()
        empty = torch.zeros(2, labels.numel(), device=flat.device)
        plan.losses[index] = empty.index_copy(1, place, both).view(2, *labels.shape)
        per_token = torch.zeros(labels.numel(), device=flat.device)
        return per_token.index_copy(0, place, values.float()).view(labels.shape)

    def _reference_part(self, plan: _Plan, index: int, place: Tensor) -> dict[str, Any]:
        if self.reference is None or index not in plan.states:
            return {"reference_hidden": None, "reference_head": None}
        output = self.reference.output
        assert output is not None
        own = plan.states.pop(index).to(place.device, non_blocking=True)
        states = whole_sequence(own, is_spread=output.sequence_parallel, is_trained=False)
        flat = states.transpose(0, 1).flatten(0, 1).index_select(0, place)
        return {"reference_hidden": flat, "reference_head": output.weight.detach()}

    # ---- after the schedule

    def close(self, plan: _Plan) -> None:
        """Metrics and ledger of the step, on the owner; an error is raised in the next step.

        Collectives: with context parallelism an all-gather of 8 bytes a token over those ranks that
        are first in tensor parallelism; those of `Recorder.close` over the owners.
        """
        layout = self.layout
        if not layout.is_last_stage or layout.tp_rank != 0:
            return
        order = sorted(plan.losses)
        found = layout.all_tokens(torch.stack([plan.losses[index] for index in order]))
        plan.losses = dict(zip(order, found, strict=True))
        if self.recorder is None:
            return
        self.failed = self.failed or capture(self._close_owner, plan).error

    def _close_owner(self, plan: _Plan) -> None:
        owned, recorder = plan.owned, self.recorder
        assert owned is not None
        assert recorder is not None
        for index, planned in enumerate(owned.micro_batches):
            batch, rows = plan.batches[index], planned.plan
            assert rows is not None
            place = batch.response_index.to(plan.losses[index].device)
            ce, divergence = plan.losses[index].flatten(1).index_select(1, place)
            task, weight = (
                w.to(ce.device) for w in self.objective.token_weights(batch, rows.kl_coef)
            )
            total = (task * ce + torch.where(weight > 0, weight * divergence, 0.0)).sum()
            loss = Loss(total / owned.num_tokens.clamp_min(1), ce * (task > 0), divergence)
            ran = len(batch.rows) if index in plan.to_run else 0
            owned.metrics.add(batch, MicroBatchResult(loss, rows.risk, rows.kl_coef, ran, 0))
        recorder.close(owned, lr=float("nan"), grad_norm=float("nan"))


class _Agreed(NoReference):
    """Stands where `SafetyRegularizer` asks its reference: schedules, and agrees over all ranks."""

    def __init__(self, run: _Run, risk: RiskStage) -> None:
        self._run = run
        self._risk = risk
        self._sums: list[int] = [0, 0, 0, 0]

    def schedule(
        self,
        rows: Sequence[Row],
        kl_coef: Sequence[float],
        *,
        sizes: Sequence[int],
        may_sort: bool = True,
    ) -> ReferenceSchedule:
        """Which rows are active. Collectives: none."""
        coef = sum(round(value * _UNIT) for value in kl_coef)
        known = [known_risk(value) for value in self._risk.last.values if value is not None]
        risk = sum(round(value * _UNIT) for value in known)
        self._sums = [risk, len(known), coef, len(rows)]
        return schedule_rows(rows, kl_coef, sizes=sizes, may_sort=may_sort)

    def start_agreement(
        self, schedule: Result[ReferenceSchedule], *, micro_batches: int, is_sorted: bool
    ) -> Agreement:
        """Starts the agreement on the active micro-batches; see `_Run.plan`."""
        words = -(-micro_batches // _BITS)
        own = schedule.then(lambda known: [*_flags(known, words), *self._sums])
        return self._run.agree(own, words)


def _flags(schedule: ReferenceSchedule, words: int) -> list[int]:
    """One bit for each micro-batch that holds an active row."""
    found = [0] * words
    for index in range(len(schedule.sizes)):
        if any(place in schedule.to_run for place in schedule.places(index)):
            found[index // _BITS] |= 1 << (index % _BITS)
    return found


def _places(words: Sequence[int]) -> list[int]:
    """The micro-batches whose bits are set."""
    return [
        i * _BITS + bit for i, word in enumerate(words) for bit in range(_BITS) if word >> bit & 1
    ]


def _needed(
    active: list[int], of_replicas: list[list[int]], count: int, layout: Layout
) -> list[int]:
    """The micro-batches that the reference runs on: more where others or the schedule need them."""
    wanted = len(active)
    if layout.shares_experts:
        wanted = max(map(len, of_replicas))
    wanted = -(-wanted // layout.group_of_micro_batches) * layout.group_of_micro_batches
    others = [index for index in range(count) if index not in active]
    return sorted([*active, *others[: wanted - len(active)]])


class _ReadAhead:
    """The items of one step's micro-batches, read before its schedule and given to it again."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        given = arguments["data_iterator"]
        self.chunks = _listed(arguments["model"])
        self.count: int = arguments["num_microbatches"]
        self.shape = (arguments["micro_batch_size"], arguments["seq_length"])
        self._is_list = isinstance(given, list)
        self._iterators = given if self._is_list else [given] * len(self.chunks)
        self._items: list[list[Any] | None] = []

    def read(self) -> list[list[Any] | None]:
        """Reads the step's items; of each chunk's iterator, None where this rank has none.

        Raises:
            StopIteration: an iterator ends.
        """
        self._items = [
            None if iterator is None else [next(iterator) for _ in range(self.count)]
            for iterator in self._iterators
        ]
        return self._items

    def one(self, chunk: int, index: int) -> Iterator[Any] | None:
        """An iterator with the item of one micro-batch alone."""
        items = self._items[chunk]
        return None if items is None else iter([items[index]])

    def replayed(self) -> Any:
        """What takes the place of the data iterators."""
        found = [None if items is None else iter(items) for items in self._items]
        return found if self._is_list else found[0]


def _batch(
    read: Result[list[list[Any] | None]],
    read_item: Callable[[Any], Any],
    index: int,
    shape: tuple[int, int],
    failed: Exception | None,
) -> MicroBatch:
    """The rows of one micro-batch; an error travels in it."""

    def rows(items: list[list[Any] | None]) -> MicroBatch:
        own = items[-1]
        if own is None:
            raise ConfigError(
                "the first tensor-parallel rank of the last stage has no data iterator: it reads "
                "labels there in Megatron-LM; give it one"
            )
        batch = batch_of_stream(read_item(own[index]))
        if batch.input_ids.shape != shape:
            raise DataError(
                f"expected micro-batches of {shape[0]} lines of {shape[1]} tokens, as the schedule "
                f"was told, got {tuple(batch.input_ids.shape)}: pad each line to seq_length"
            )
        return batch

    found = Result(error=failed) if failed is not None else read.then(rows)
    error = found.error
    return found.value if error is None else MicroBatch.failed(error)


def _coefficients(owned: StepPlan, index: int) -> list[float]:
    rows = owned.micro_batches[index].plan
    assert rows is not None
    return rows.kl_coef


def _with_report(loss_func: Any, plan: _Plan, index: int) -> Any:
    """The loss function, in whose report the safety metrics stand as (numerator, count) pairs."""

    @functools.wraps(getattr(loss_func, "func", loss_func))
    def reporting(*args: Any, **kwargs: Any) -> Any:
        found = loss_func(*args, **kwargs)
        report = found[-1] if isinstance(found, tuple) else None
        if isinstance(report, dict):
            report.update(_report(plan, index, next(iter(report.values()), None)))
        return found

    return reporting


def _report(plan: _Plan, index: int, like: Any) -> dict[str, Tensor]:
    """Pairs, or values alone where the stack's own report has no counts."""
    losses = plan.losses[index]
    pairs = {name: pair if index == 0 else (0.0, 0.0) for name, pair in plan.report.items()}
    found = {name: losses.new_tensor(pair) for name, pair in pairs.items()}
    count = 0.0
    if index in plan.active:
        assert plan.weights is not None
        count = float((plan.weights[plan.active.index(index), DIVERGENCE] > 0).sum())
    found["divergence"] = torch.stack([losses[1].sum(), losses.new_tensor(count)])
    if isinstance(like, Tensor) and like.numel() == 1:
        found = {name: pair[0] / pair[1].clamp_min(1) for name, pair in found.items()}
    return {f"safereg/{name}": value for name, value in found.items()}


def _listed(given: Any) -> list[nn.Module]:
    return list(given) if isinstance(given, list | tuple) else [given]


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
