"""One step of one rank of a Megatron run, in the order in which it runs.

plan            risk (probes run the reference's first layers), coefficient, agreement
run_reference   the reference, forward-only, on the micro-batches that need it
training        a block around the policy's schedule
micro_batch     a block around each forward of a chunk; the loss stands in its output layer
close           metrics and ledger
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safereg_dist.config import Config
from safereg_dist.factory.prepare import objective_of
from safereg_dist.integrations.megatron.agreement import (
    active_rows,
    agree,
    agreed,
    needed,
    numbers_of_step,
    report_of,
)
from safereg_dist.integrations.megatron.probes import Probes
from safereg_dist.integrations.megatron.read_ahead import ReadAhead
from safereg_dist.integrations.megatron.stored import (
    NO_LINE,
    StoredStates,
    line_keys,
    packed_keys,
    unpacked_keys,
)
from safereg_dist.integrations.recorder import Recorder
from safereg_dist.parallel.comm import Agreement, Result, capture
from safereg_dist.parallel.megatron import Layout, innermost
from safereg_dist.parallel.megatron_model import (
    CallRecorder,
    OutputLayer,
    PipelinedReference,
    whole_sequence,
)
from safereg_dist.reference.reference import ReferenceSchedule
from safereg_dist.step import SafetyRegularizer, StepPlan
from safereg_dist.types import Head, Loss, MicroBatch, MicroBatchResult

TASK, DIVERGENCE, MASK = 0, 1, 2
"""The weights of a token, in this order."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a forward-only pass over some micro-batches of a step needs."""

    schedule: Callable[..., Any]
    """Megatron's, plain."""
    arguments: dict[str, Any]
    forward_step: Callable[..., Any]
    """The user's, plain."""
    data: ReadAhead
    known: dict[tuple[int, int], Any] = field(default_factory=dict)
    """(chunk, micro-batch) -> the arguments that the forward step calls it with."""

    def calls(self, recorders: Sequence[CallRecorder], to_run: Sequence[int]) -> list[list[Any]]:
        """Of each chunk the arguments of its calls; each is asked for once in a step.

        Collectives: what the forward step runs before it calls its model.
        """
        for k, recorder in enumerate(recorders):
            for m in to_run:
                if (k, m) not in self.known:
                    items, chunk = self.data.one(k, m), self.data.chunks[k]
                    call = functools.partial(self.forward_step, items, chunk)
                    self.known[k, m] = recorder.call_in(call)
        return [[self.known[k, m] for m in to_run] for k in range(len(recorders))]


@dataclass(slots=True, kw_only=True)
class Plan:
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
    keys: dict[int, dict[int, bytes]] = field(default_factory=dict)
    """On the last stage, where states are stored: micro-batch -> its active lines' keys."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """On the last stage: micro-batch -> the reference's [S, B, H]."""
    losses: dict[int, Tensor] = field(default_factory=dict)
    """On the last stage: micro-batch -> [2, B, S] cross-entropy and divergence of its tokens."""


class Replica:
    """A rank of a replica: its layout, its chunks, and on an owner the regulariser and the logs."""

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
        """Why this rank could not end its last step; raised with the next agreement."""
        self._has_store = config.reference.cache is not None
        self.stored: StoredStates | None = None
        """On the last stage, where states are kept on disk."""
        self.probes: Probes | None = None
        self.reads_policy = config.risk.source == "policy"
        """Whether the probes read the policy; else the reference."""
        self._plan: Plan | None = None
        self._next: list[int] = []
        self._current: int | None = None
        self._probing: list[int] = []
        self._batches: list[MicroBatch] = []
        self._keys: dict[int, list[bytes]] = {}

    @property
    def is_training(self) -> bool:
        """True inside a training schedule."""
        return self._plan is not None

    # ---- before the schedule

    def plan(self, run: Pass, step: int) -> Plan:
        """Risk, coefficients, and the agreement on the micro-batches that the reference runs on.

        Raises:
            The first failed rank's error, on all ranks.
        Collectives: with probes those of `Probes`; those of `SafetyRegularizer.open` over the
        owners; one MAX all-reduce of 8 bytes for each data-parallel replica and 60 micro-batches,
        and 40 more for each; where a micro-batch of this replica is active, a broadcast of its
        tokens' weights from the owner over the tensor- and context-parallel ranks of the last
        stage. Where states are stored 8 bytes more for each replica and 60 micro-batches, a
        broadcast of the lines' keys, and where any replica reads some a MAX all-reduce of 8 bytes.
        """
        data, layout = run.data, self.layout
        batches = self._batches = self._read_rows(data)
        if self.probes is not None:
            to_probe = self.probes.begin(batches, data.count, data.shape[1])
            if not self.reads_policy:
                self._probe_reference(self.probes, run, to_probe)
        owned, agreement = self._decide(data, step)
        found = agreed(agreement, data.count, has_store=self._has_store)
        runs = [
            [index for index in active if index not in stored]
            for active, stored in zip(found.active, found.stored, strict=True)
        ]
        own = layout.data.rank
        to_run = needed(runs[own], runs, data.count, layout)
        ran = (float(len(to_run)), float(data.count))
        plan = Plan(
            batches=batches,
            owned=owned,
            active=found.active[own],
            to_run=to_run,
            report=report_of(found.sums[own]) | {"reference_share": ran},
        )
        if plan.active and layout.is_last_stage:
            plan.weights = self._weights(plan, data.shape)
        if self._has_store:
            self._read_stored(plan, found.stored[own], has_any=any(found.stored))
        return plan

    def _read_rows(self, data: ReadAhead) -> list[MicroBatch]:
        """On the owner the rows of each micro-batch, or why its last step failed."""
        if not self.layout.is_owner:
            return []
        if self.failed is not None:
            return [MicroBatch.failed(self.failed)] * data.count
        return data.batches()

    def _decide(self, data: ReadAhead, step: int) -> tuple[StepPlan | None, Agreement]:
        """On the owner risk and coefficients; the agreement on what follows from them, begun."""
        if self.regularizer is not None:
            owned = self.regularizer.open(self._batches, step=step)
            passes = owned.micro_batches[0].plan
            assert passes is not None
            assert passes.passes.agreement is not None  # `AgreedReference` has begun one
            return owned, passes.passes.agreement
        size = numbers_of_step(data.count, has_store=self._has_store)
        read = data.read if self.failed is None else Result(error=self.failed)
        return None, agree(self.layout, read.then(lambda _: [0] * size), size)

    def current(self) -> int | None:
        """The micro-batch that a probed forward runs for; None in any other forward."""
        if self.reads_policy:
            return self._current
        if not self._probing or self.reference is None:
            return None
        return self._probing[self.reference.running]

    def _probe_reference(self, probes: Probes, run: Pass, to_probe: list[int]) -> None:
        """Runs the reference up to the last probed layer."""
        assert self.reference is not None
        if to_probe:
            self._probing = to_probe
            calls = run.calls(self.recorders, to_probe)
            self.reference.states(run.schedule, run.arguments, calls, num_layers=probes.num_layers)
            self._probing = []
        probes.finish()

    def _weights(self, plan: Plan, shape: tuple[int, int]) -> Tensor:
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

    def find_stored(self, schedule: ReferenceSchedule) -> list[int]:
        """On the owner: the active micro-batches all of whose active lines are stored."""
        assert self.stored is not None
        self.stored.flush()
        self._keys = {
            index: line_keys(batch, active_rows(schedule, index))
            for index, batch in enumerate(self._batches)
        }
        wanted = {i: [key for key in keys if key != NO_LINE] for i, keys in self._keys.items()}
        return [i for i, keys in wanted.items() if keys and all(map(self.stored.holds, keys))]

    def _read_stored(self, plan: Plan, stored: list[int], *, has_any: bool) -> None:
        """The states of these micro-batches, from disk; all lines' keys, for what will be run."""
        layout = self.layout
        found: Result[None] = Result()
        if plan.active and self.stored is not None:
            assert plan.weights is not None
            own = [self._keys[index] for index in plan.active if index in self._keys]
            packed = packed_keys(own, len(plan.active), plan.weights.shape[2])
            packed = layout.from_first_of_head(packed.to(layout.world.device))
            plan.keys = dict(zip(plan.active, unpacked_keys(packed), strict=True))
            found = capture(self._read_lines, plan, stored)
        if has_any:
            layout.world.raise_if_any_failed(found)

    def _read_lines(self, plan: Plan, stored: list[int]) -> None:
        assert self.stored is not None
        assert plan.weights is not None
        for index in stored:
            lines = {line: self.stored.read(key) for line, key in plan.keys[index].items()}
            shape = next(iter(lines.values())).shape
            states = next(iter(lines.values())).new_zeros(shape[0], plan.weights.shape[2], shape[1])
            for line, found in lines.items():
                states[:, line] = found
            plan.states[index] = states

    def run_reference(self, plan: Plan, run: Pass) -> None:
        """The reference's states of the active micro-batches, on the last stage.

        Collectives: what `forward_step` runs before it calls its model, once more for each of these
        micro-batches; those of the schedule's forward.
        """
        if self.reference is None or not plan.to_run:
            return
        calls = run.calls(self.recorders, plan.to_run)
        states = self.reference.states(run.schedule, run.arguments, calls)
        budget = self.config.reference.keep_bytes
        for index, found in zip(plan.to_run, states, strict=False):
            if index not in plan.active or index in plan.states:
                continue
            budget -= found.nbytes
            plan.states[index] = found if budget >= 0 else found.cpu()
            for line, key in plan.keys.get(index, {}).items():
                assert self.stored is not None
                written = capture(self.stored.write, key, found[:, line])
                self.failed = self.failed or written.error

    # ---- inside the schedule

    @contextmanager
    def training(self, plan: Plan) -> Iterator[None]:
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
        self._current = index
        output = self.output if place == len(self.chunks) - 1 else None
        try:
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
        finally:
            self._current = None

    def _loss(self, plan: Plan, index: int, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
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

    def _reference_part(self, plan: Plan, index: int, place: Tensor) -> dict[str, Any]:
        if self.reference is None or index not in plan.states:
            return {"reference_hidden": None, "reference_head": None}
        output = self.reference.output
        assert output is not None
        own = plan.states.pop(index).to(place.device, non_blocking=True)
        states = whole_sequence(own, is_spread=output.sequence_parallel, is_trained=False)
        flat = states.transpose(0, 1).flatten(0, 1).index_select(0, place)
        return {"reference_hidden": flat, "reference_head": output.weight.detach()}

    # ---- after the schedule

    def close(self, plan: Plan) -> None:
        """Metrics and ledger of the step, on the owner; an error is raised in the next step.

        Collectives: with a probe on the policy those of `Probes.finish`; with context parallelism
        an all-gather of 8 bytes a token over those ranks that are first in tensor parallelism;
        those of `Recorder.close` over the owners.
        """
        layout = self.layout
        if self.probes is not None and self.reads_policy:
            self.probes.finish()
        if not layout.is_last_stage or layout.tp_rank != 0:
            return
        order = sorted(plan.losses)
        found = layout.all_tokens(torch.stack([plan.losses[index] for index in order]))
        plan.losses = dict(zip(order, found, strict=True))
        if self.recorder is None:
            return
        self.failed = self.failed or capture(self._close_owner, plan).error

    def _close_owner(self, plan: Plan) -> None:
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


def _coefficients(owned: StepPlan, index: int) -> list[float]:
    rows = owned.micro_batches[index].plan
    assert rows is not None
    return rows.kl_coef


def _with_report(loss_func: Any, plan: Plan, index: int) -> Any:
    """The loss function, in whose report the safety metrics stand as (numerator, count) pairs."""

    @functools.wraps(getattr(loss_func, "func", loss_func))
    def reporting(*args: Any, **kwargs: Any) -> Any:
        found = loss_func(*args, **kwargs)
        report = found[-1] if isinstance(found, tuple) else None
        if isinstance(report, dict):
            report.update(_report(plan, index, next(iter(report.values()), None)))
        return found

    return reporting


def _report(plan: Plan, index: int, like: Any) -> dict[str, Tensor]:
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
