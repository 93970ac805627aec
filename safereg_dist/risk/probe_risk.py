"""Stage 1, with a probe: risk from hidden states of the policy or of the frozen reference."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from safereg_dist.data.collation import padded
from safereg_dist.errors import DataError
from safereg_dist.models.fingerprint import row_key
from safereg_dist.parallel.comm import Ranks, capture
from safereg_dist.regions import PROBE, region
from safereg_dist.risk.cached import CachedRisk, KnownRisks, read_state
from safereg_dist.risk.probe import Probe, pool_spans
from safereg_dist.risk.stage import ProbedStates, Risk, RiskSource
from safereg_dist.types import Row, known_risk, to_device


class PolicyProbeRisk(RiskSource):
    """A probe on hidden states of the policy's training forward: free, but it drifts."""

    name = "probe-policy"
    reads_policy = True

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    @region(PROBE)
    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """The largest probability over each row's turns. Collectives: none; one host sync."""
        assert probed is not None
        turns, pooled = self.read(rows, probed)
        return turn_risks(self._probe, len(rows), turns, pooled)

    def read(self, rows: Sequence[Row], probed: ProbedStates) -> tuple["Turns", Tensor]:
        """The turns that the probe reads, and their [N, H] states."""
        turns = probed_turns(self._probe, rows)
        return turns, pooled_turns(self._probe, probed.hidden, probed.row_begins, turns)


class LaggedProbeRisk(RiskSource):
    """A probe on the policy where states come too late for the step that they belong to.

    Every row of a step has the mean risk of this replica's rows in the step before; in the first
    step 1, the safe side. Made for granularity `batch`, whose coefficient is one for all rows.
    """

    name = "probe-policy-lagged"

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._last = 1.0

    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """The last step's mean on every row with a prompt. Collectives: none."""
        return [self._last if row.prompt_ends and not row.is_anchor else None for row in rows]

    def learn(self, risks: Risk) -> None:
        """Takes the risks of the rows of the step that has just run."""
        known = [known_risk(risk) for risk in risks if risk is not None]
        self._last = math.fsum(known) / len(known) if known else self._last

    def end_step(self, total: Mapping[str, float]) -> dict[str, float | int]:
        """Says that the risk is one of an earlier step."""
        return {"risk_lag": 1}

    def save_state(self, path: Path) -> None:
        """Writes the last mean as safetensors."""
        tensors = {"last": torch.tensor(self._last, dtype=torch.float64)}
        save_file(tensors, path, metadata={"probe": self.probe.identity})

    def load_state(self, path: Path) -> None:
        """Restores what `save_state` wrote.

        Raises:
            CheckpointError: it cannot be read, or belongs to another probe.
        """
        self._last = float(read_state(path, self.probe)["last"])


class ReferenceTrunkPrefix(Protocol):
    """Runs the reference's first layers (`reference.Reference`)."""

    def prompt_states(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after `num_layers` layers; every rank calls it the same number of times."""
        ...


class CachedProbeRisk(CachedRisk):
    """A probe on the frozen reference. A row's risk is computed once and cached by its content.

    A prompt-side probe reads prompt tokens and no others; a response-side one reads the answer that
    the row teaches, teacher-forced.
    """

    name = "probe-reference"

    def __init__(self, probe: Probe, *, known: KnownRisks | None = None) -> None:
        super().__init__(probe, known=known)
        self.probe = probe

    def key_of(self, row: Row) -> str:
        """The key of the tokens that the probe reads."""
        return probe_key(row, self.probe.position)


class ReferenceProbeRisk(CachedProbeRisk):
    """Runs the reference itself, up to the probed layer only."""

    def __init__(
        self,
        probe: Probe,
        reference: ReferenceTrunkPrefix,
        *,
        ranks: Ranks,
        rows_per_pass: int,
        known: KnownRisks | None = None,
        is_asked_seldom: bool = False,
    ) -> None:
        """`is_asked_seldom`: not called on every row, so a row may be new to it in any epoch."""
        super().__init__(probe, known=known)
        self._reference = reference
        self._ranks = ranks
        self._rows_per_pass = rows_per_pass
        self._is_asked_seldom = is_asked_seldom

    @region(PROBE)
    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """Cached risk, computed first where it is missing.

        Collectives: none after the first epoch; before that one 8-byte MAX all-reduce, and the
        reference's own for the layers run. An unreadable cache raises the error on all ranks in
        the all-reduce; an unwritable one raises it after the last pass.
        """
        keys = self.keys(rows)
        if in_first_epoch or self._is_asked_seldom:
            self._score_missing(rows, keys)
        return [None if key is None else self.cache[key] for key in keys]

    def _score_missing(self, rows: Sequence[Row], keys: list[str | None]) -> None:
        missing = capture(self._readable, rows, keys)
        passes = self._ranks.max_over_ranks(
            missing.then(lambda places: -(-len(places) // self._rows_per_pass))
        )
        new: dict[str | None, float | None] = {}
        for i in range(passes):
            group = missing.value[i * self._rows_per_pass : (i + 1) * self._rows_per_pass]
            new |= self._score(rows, group, keys)
        self.learn(new)

    def _readable(self, rows: Sequence[Row], keys: list[str | None]) -> list[int]:
        """Places of the rows to score.

        Raises:
            DataError: one of them has nothing that this probe reads.
        """
        places = self.missing(keys)
        for row in (rows[place] for place in places):
            if self.probe.position == "prompt" and 0 in row.prompt_ends:
                raise DataError(
                    f"row {row.id!r} has no prompt: its loss begins at the first token, so a probe "
                    "on prompts has nothing to read. TRL trains every token of `messages`: set "
                    "assistant_only_loss=True, or give `prompt` and `completion`"
                )
        return places

    def pooled(self, rows: Sequence[Row], turns: "Turns") -> Tensor:
        """[N, H] states of the turns of all rows, in order, without the cache.

        The number of passes depends on the number of rows only, so it is the same on every rank.
        """
        pieces = []
        for begin in range(0, len(rows), self._rows_per_pass):
            group = range(begin, min(begin + self._rows_per_pass, len(rows)))
            wanted = sorted({row for row in turns.rows if row in group})
            pieces.append(self._run(rows, wanted)[1])
        return torch.cat(pieces)

    def _score(
        self, rows: Sequence[Row], group: list[int], keys: list[str | None]
    ) -> dict[str | None, float | None]:
        turns, pooled = self._run(rows, group)
        risks = turn_risks(self.probe, len(group), turns, pooled)
        return {keys[i]: risk for i, risk in zip(group, risks, strict=True)}

    def _run(self, rows: Sequence[Row], group: list[int]) -> tuple["Turns", Tensor]:
        """Runs one pass: the rows' turns and their [N, H] states; without rows a dummy token."""
        device = self._ranks.device
        if not group:
            dummy = torch.zeros(1, 1, dtype=torch.int64, device=device)
            states = self._reference.prompt_states(dummy, self.probe.layer)
            return Turns([], [], []), states.new_zeros(0, states.shape[-1])
        chosen = [rows[index] for index in group]
        turns = probed_turns(self.probe, chosen)
        ids = padded([row.input_ids for row in chosen], width=max(turns.last) + 1)
        states = self._reference.prompt_states(to_device(ids, device), self.probe.layer)
        begins = range(0, ids.numel(), ids.shape[1])
        return turns, pooled_turns(self.probe, states, begins, turns)


def probe_key(row: Row, position: str) -> str:
    """SHA-256 (hex) of the tokens that a probe at this position reads, and of the turns' places."""
    if position == "prompt":
        return row.prompt_key
    return row_key(row.input_ids, row.loss_mask)


class Turns(NamedTuple):
    """What a probe reads of some rows: N spans of real tokens, one for each assistant turn."""

    rows: list[int]
    """[N] index of each span's row in the given rows."""
    first: list[int]
    """[N] first token of the span, counted from the row's first real token."""
    last: list[int]
    """[N] its last token, included."""


def probed_turns(probe: Probe, rows: Iterable[Row]) -> Turns:
    """The prompt before each assistant turn, or the turn itself; none on anchor rows."""
    turns = Turns([], [], [])
    for place, row in enumerate(rows):
        if row.is_anchor:
            continue
        for end in row.prompt_ends:
            first, last = (0, end - 1) if probe.position == "prompt" else (end, _turn_end(row, end))
            turns.rows.append(place)
            turns.first.append(first)
            turns.last.append(last)
    return turns


def _turn_end(row: Row, begin: int) -> int:
    """Last token of the assistant turn that begins at `begin`, end-of-turn token included."""
    end = begin
    while end + 1 < len(row.loss_mask) and row.loss_mask[end + 1]:
        end += 1
    return end


def pooled_turns(probe: Probe, states: Tensor, row_begins: Sequence[int], turns: Turns) -> Tensor:
    """[N, H] pooled states of the turns of rows that begin at these flat positions."""
    width, begins = states.shape[1], [row_begins[row] for row in turns.rows]
    spans = (
        [begin // width for begin in begins],
        [begin % width + first for begin, first in zip(begins, turns.first, strict=True)],
        [begin % width + last for begin, last in zip(begins, turns.last, strict=True)],
    )
    rows, first, last = (
        to_device(torch.tensor(values, dtype=torch.int64), states.device) for values in spans
    )
    return pool_spans(states, rows=rows, first=first, last=last, pooling=probe.pooling)


def turn_risks(probe: Probe, num_rows: int, turns: Turns, pooled: Tensor) -> Risk:
    """The largest risk over each row's turns; nan if any turn failed. One host sync."""
    return max_per_row(num_rows, turns.rows, probe.probability(pooled).tolist())


def max_per_row(num_rows: int, rows: Sequence[int], probability: Sequence[float]) -> Risk:
    """[num_rows] the largest value of each row; nan if one is nan, None without values."""
    risk: Risk = [None] * num_rows
    for row, value in zip(rows, probability, strict=True):
        known = risk[row]
        if known is None or math.isnan(value) or value > known:
            risk[row] = value
    return risk
