"""Stage 1 with probes: a replica's hidden states lie over its ranks.

The owner knows which tokens a probe reads, the ranks of the layer's stage have the states. So the
places go from the owner to all ranks of its replica; each rank of that stage pools the positions it
holds; these shares are summed over the ranks that hold other positions of the sequence (sequence
and context parallelism), never over those that hold the same ones; and the probabilities go from
that stage to all others.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safereg_dist.errors import ConfigError
from safereg_dist.integrations.megatron.agreement import (
    agree,
    by_replica,
    flags_of,
    needed,
    places_of,
    words_of,
)
from safereg_dist.parallel.comm import Result, capture
from safereg_dist.parallel.megatron import Layout
from safereg_dist.parallel.megatron_model import watch_layer
from safereg_dist.regions import PROBE, region
from safereg_dist.risk.probe import Probe, pool_share
from safereg_dist.risk.probe_risk import (
    CachedProbeRisk,
    LaggedProbeRisk,
    max_per_row,
    probed_turns,
)
from safereg_dist.types import MicroBatch, Row, to_device


class Span(NamedTuple):
    """Tokens of a micro-batch that a probe pools."""

    micro_batch: int
    line: int
    first: int
    """Its first position in the line."""
    last: int
    """Its last one, included."""


class ProbeReader:
    """One probe on the layer of a model whose chunks lie over the ranks of a replica."""

    def __init__(
        self,
        probe: Probe,
        chunks: Sequence[nn.Module],
        layout: Layout,
        *,
        is_spread: bool,
        current: Callable[[], int | None],
    ) -> None:
        """`is_spread`: states lie over tensor-parallel ranks (sequence parallelism).

        `current` gives the micro-batch that a forward runs for, None where its states are of no
        interest.

        Raises:
            ConfigError: no stage has the layer, on all ranks.
        Collectives: one MAX all-reduce of 8 bytes over all ranks.
        """
        self.probe = probe
        self._layout = layout
        self._is_spread = is_spread
        self._is_here = watch_layer(chunks, probe.layer, self._read)
        own_stage = layout.pp_group.rank() if self._is_here else -1
        self._stage = layout.world.max_over_ranks(Result(own_stage + 1)) - 1
        if self._stage < 0:
            raise ConfigError(
                f"no stage has layer {probe.layer}, which the probe reads: fit a probe for this "
                "model, or give decoder layers their `layer_number`"
            )
        self._current = current
        self._positions = torch.empty(0, dtype=torch.int64)
        self._by_micro_batch: dict[int, list[Span]] = {}
        self._shares: dict[int, Tensor] = {}

    def begin(self, spans: Sequence[Span], count: int, length: int) -> None:
        """Takes the owner's spans, `count` of them, of lines of `length` tokens.

        Collectives: broadcasts of 32 bytes a span within the replica, where there are any.
        """
        layout, self._shares = self._layout, {}
        positions = layout.positions(length, is_spread=self._is_spread)
        self._positions = to_device(positions, layout.world.device)
        own = torch.zeros(count, len(Span._fields), dtype=torch.int64)
        if layout.is_owner:
            own = torch.tensor(spans, dtype=torch.int64).reshape(own.shape)
        if count:
            own = layout.from_owner(own.to(layout.world.device)).cpu()
        self._by_micro_batch = defaultdict(list)
        for values in own.tolist():
            self._by_micro_batch[values[0]].append(Span(*values))

    @region(PROBE)
    def _read(self, states: Tensor) -> None:
        current = self._current()
        spans = None if current is None else self._by_micro_batch.get(current)
        if current is None or not spans:
            return
        _, lines, first, last = to_device(torch.tensor(spans).T.contiguous(), states.device)
        self._shares[current] = pool_share(
            states.transpose(0, 1),
            self._positions,
            rows=lines,
            first=first,
            last=last,
            pooling=self.probe.pooling,
        )

    @region(PROBE)
    def finish(self) -> list[float]:
        """The probability of each span, by micro-batch, on all ranks of the replica.

        Collectives: sums over the stage's ranks with other positions; a broadcast of 4 bytes a
        span over the pipeline. One host sync.
        """
        layout = self._layout
        found = torch.zeros(
            sum(map(len, self._by_micro_batch.values())), device=layout.world.device
        )
        if not len(found):
            return []
        if self._is_here:
            pooled = torch.cat([self._shares[index] for index in sorted(self._shares)])
            layout.sum_of_sequence(pooled, is_spread=self._is_spread)
            found = self.probe.probability(pooled)
        return layout.from_stage(found, self._stage).tolist()


class Probes:
    """The probes of a run, all on the reference, or one on the policy."""

    def __init__(self, readers: Sequence[ProbeReader], layout: Layout) -> None:
        self._readers = readers
        self._layout = layout
        self.sources: list[CachedProbeRisk] | list[LaggedProbeRisk] = []
        """On the owner those that the probabilities are for, in the order of the readers."""
        self._asked: list[list[int]] = []
        self._rows: list[Row] = []

    @property
    def num_layers(self) -> int:
        """Layers that have to run for all of them."""
        return max(reader.probe.layer for reader in self._readers)

    def begin(self, batches: Sequence[MicroBatch], count: int, length: int) -> list[int]:
        """The micro-batches, of `count` in lines of `length` tokens, with rows to be probed.

        `batches` are the owner's rows. Raises the first failed rank's error, on all ranks.
        Collectives: one MAX all-reduce over all ranks, of 8 bytes a replica for each probe and each
        60 micro-batches; those of `ProbeReader.begin`.
        """
        words, layout = words_of(count), self._layout
        found = capture(self._asked_of, batches)

        def numbers(found: list[tuple[list[int], list[Span]]]) -> list[int]:
            places = {span.micro_batch for _, spans in found for span in spans}
            return [*flags_of(places, count), *(len(spans) for _, spans in found)]

        size = words + len(self._readers)
        own = found.then(numbers) if layout.is_owner else found.then(lambda _: [0] * size)
        table = by_replica(agree(layout, own, size), size)
        counts = table[layout.data.rank][words:]
        self._asked = [rows for rows, _ in found.value]
        for reader, (_, spans), number in zip(self._readers, found.value, counts, strict=True):
            reader.begin(spans, number, length)
        flags = [places_of(row[:words]) for row in table]
        return needed(flags[layout.data.rank], flags, count, layout)

    def _asked_of(self, batches: Sequence[MicroBatch]) -> list[tuple[list[int], list[Span]]]:
        """Of each probe the turns of rows whose risk is not known; on other ranks none."""
        if not self._layout.is_owner:
            return [([], []) for _ in self._readers]
        errors = [batch.error for batch in batches if batch.error is not None]
        if errors:
            raise errors[0]
        self._rows = [row for batch in batches for row in batch.rows]
        found = []
        for source in self.sources:
            wanted = range(len(self._rows))
            if isinstance(source, CachedProbeRisk):
                wanted = source.missing(source.keys(self._rows))
            found.append(spans_of(source.probe, batches, wanted))
        return found

    def finish(self) -> None:
        """Lets the sources learn what the forwards have shown.

        Collectives: those of `ProbeReader.finish`.
        """
        found = [reader.finish() for reader in self._readers]
        for source, rows, probabilities in zip(self.sources, self._asked, found, strict=False):
            risks = max_per_row(len(self._rows), rows, probabilities)
            if isinstance(source, CachedProbeRisk):
                asked = sorted(set(rows))
                keys = source.keys([self._rows[row] for row in asked])
                source.learn(dict(zip(keys, (risks[row] for row in asked), strict=True)))
            else:
                source.learn(risks)


def spans_of(
    probe: Probe, batches: Sequence[MicroBatch], wanted: Sequence[int]
) -> tuple[list[int], list[Span]]:
    """Of each turn of the wanted rows its row and its span; rows count over all micro-batches.

    A response's last token belongs to no row where it ends the line, or begins another document:
    there the state before it is the last one.
    """
    rows, spans, chosen, before = [], [], set(wanted), 0
    for index, batch in enumerate(batches):
        width = batch.input_ids.shape[1] if batch.rows else 0
        ends = {*batch.row_begins, *range(width, batch.input_ids.numel() + 1, width or 1)}
        own = [i for i in range(len(batch.rows)) if before + i in chosen]
        turns = probed_turns(probe, [batch.rows[i] for i in own])
        for place, first, last in zip(*turns, strict=True):
            begin = batch.row_begins[own[place]]
            line, offset = divmod(begin, width)
            end = last - (last > 0 and begin + last in ends)
            rows.append(before + own[place])
            spans.append(Span(index, line, offset + min(first, end), offset + end))
        before += len(batch.rows)
    return rows, spans
