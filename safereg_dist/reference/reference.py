"""Stage 5: the frozen reference, run on the rows that need it and on no others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safereg_dist.parallel.engine import Backend, ReferenceEngine
from safereg_dist.reference.trunk import ReferenceTrunk
from safereg_dist.types import NO_HEAD, Head, MicroBatch, head_of


class NoReference:
    """Stands where the objective has no divergence: runs nothing, agrees on nothing."""

    def agree_on_passes(self, batch: MicroBatch, kl_coef: list[float] | Exception) -> int:
        """Always 0. Collectives: none."""
        if isinstance(kl_coef, Exception):
            raise kl_coef
        return 0

    def hidden_states(
        self, batch: MicroBatch, kl_coef: list[float], *, passes: int
    ) -> tuple[None, int]:
        """Nothing, on no rows."""
        return None, 0

    @contextmanager
    def gathered_head(self, *, passes: int) -> Iterator[Head]:
        """A block without a head."""
        yield NO_HEAD


class Reference:
    """Runs the frozen reference on packed rows; every rank the same number of times."""

    def __init__(
        self, model: PreTrainedModel, *, backend: Backend, offload: str, rows_per_pass: int
    ) -> None:
        self.model = model
        self._backend = backend
        self._rows_per_pass = rows_per_pass
        self.engine: ReferenceEngine = backend.wrap_reference(
            ReferenceTrunk(model), offload=offload, rows=rows_per_pass
        )

    def agree_on_passes(self, batch: MicroBatch, kl_coef: list[float] | Exception) -> int:
        """The passes that every rank makes: the most that any rank needs for its active rows.

        Where a rank has an error instead of coefficients, all ranks raise it together.
        Collectives: one 8-byte MAX all-reduce.
        """
        if isinstance(kl_coef, Exception):
            return self._backend.ranks.agree_on_passes(kl_coef)
        need = -(-len(active_rows(kl_coef, batch)) // self._rows_per_pass)
        return self._backend.ranks.agree_on_passes(need)

    def hidden_states(
        self, batch: MicroBatch, kl_coef: list[float], *, passes: int
    ) -> tuple[Tensor | None, int]:
        """[T, H_ref] reference states of active rows' response tokens, and the rows run.

        Other tokens hold zeros and are never read. A rank with fewer rows than passes runs one
        dummy token in each pass that is left, so that every rank joins every collective. None where
        no rank needs a pass. Collectives: the engine's, `passes` times.
        """
        if passes == 0:
            return None, 0
        rows = active_rows(kl_coef, batch)
        groups = [
            rows[i * self._rows_per_pass : (i + 1) * self._rows_per_pass] for i in range(passes)
        ]
        hidden: Tensor | None = None
        for group in groups:
            states = self._run(batch, group)
            if hidden is None:
                hidden = states.new_zeros(batch.num_response_tokens, states.shape[-1])
            if group:
                _scatter_responses(hidden, states, batch, group)
        return hidden, len(rows)

    def prompt_states(self, input_ids: Tensor, attention_mask: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after `num_layers` layers, which alone run. Collectives: the engine's."""
        return self.engine.prefix(input_ids, attention_mask, num_layers)

    @contextmanager
    def gathered_head(self, *, passes: int) -> Iterator[Head]:
        """A block in which the head is whole; nothing is gathered when no pass was needed.

        Collectives: one all-gather per head parameter, if `passes` > 0.
        """
        if passes == 0:
            yield NO_HEAD
            return
        head = head_of(self.model)
        with self._backend.gathered(head.parameters):
            yield head

    def _run(self, batch: MicroBatch, rows: list[int]) -> Tensor:
        if not rows:
            dummy = torch.zeros(1, 1, dtype=torch.int64, device=batch.input_ids.device)
            return self.engine(dummy, torch.ones_like(dummy))
        width = max(len(batch.rows[row].input_ids) for row in rows)
        index = torch.tensor(rows).to(batch.input_ids.device, non_blocking=True)
        return self.engine(
            batch.input_ids.index_select(0, index)[:, :width],
            batch.attention_mask.index_select(0, index)[:, :width],
        )


def active_rows(kl_coef: list[float], batch: MicroBatch) -> list[int]:
    """Rows with a coefficient above 0 and at least one response token."""
    return [
        index
        for index, (coef, row) in enumerate(zip(kl_coef, batch.rows, strict=True))
        if coef > 0 and any(row.loss_mask)
    ]


def _scatter_responses(hidden: Tensor, states: Tensor, batch: MicroBatch, rows: list[int]) -> None:
    """Copies the states that predict response tokens of `rows` to their places in `hidden`."""
    width = states.shape[1]
    source: list[int] = []
    target: list[int] = []
    first = 0  # tokens are listed row by row, so each row's are contiguous
    place = {row: i for i, row in enumerate(rows)}
    for index, row in enumerate(batch.rows):
        positions = [t - 1 for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
        if index in place:
            source += [place[index] * width + p for p in positions]
            target += range(first, first + len(positions))
        first += len(positions)
    flat = states.reshape(-1, states.shape[-1])
    from_index = torch.tensor(source).to(flat.device, non_blocking=True)
    to_index = torch.tensor(target).to(flat.device, non_blocking=True)
    hidden.index_copy_(0, to_index, flat.index_select(0, from_index))
