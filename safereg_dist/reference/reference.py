"""The frozen reference: its trunk, run on packed rows, and its head."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import Backend, ReferenceEngine
from safereg_dist.reference.exchange import slowest_rates
from safereg_dist.reference.schedule import NoWindow, Window
from safereg_dist.reference.store import ReferenceStore
from safereg_dist.reference.trunk import ReferenceTrunk, used_parameters
from safereg_dist.regions import REFERENCE_HEAD, REFERENCE_TRUNK, region
from safereg_dist.types import NO_HEAD, Head, Row, head_of, to_device


class TokenRow(Protocol):
    """What the reference reads of a row."""

    @property
    def input_ids(self) -> list[int]:
        """[length] token ids."""
        ...

    @property
    def loss_mask(self) -> list[int]:
        """[length] 1 on response tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How rows share the passes of the reference, and how much is kept of them."""

    rows_per_pass: int
    """Rows of one forward."""
    keep_bytes: int = 256 << 20
    """Bytes of hidden states that may wait for their micro-batch, if more than one has to."""
    max_length: int = 1024
    """Longest row, in tokens."""
    exchange: bool = False
    """Ranks with many active rows hand some over to ranks with few, where that pays."""


class NoReference:
    """Stands where the objective has no divergence: runs nothing, agrees on nothing."""

    def open(
        self, rows: Sequence[Row], kl_coef: list[float] | Exception, *, micro_batches: int = 1
    ) -> NoWindow:
        """A window without states. Collectives: none."""
        if isinstance(kl_coef, Exception):
            raise kl_coef
        return NoWindow(len(rows))

    @contextmanager
    def gathered_head(self, is_needed: bool) -> Iterator[Head]:
        """A block without a head."""
        yield NO_HEAD


class Reference:
    """Runs the frozen reference on packed rows; every rank the same number of times.

    Its trunk is loaded when it is first run: never, where all states that are asked for are stored.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        head: Head,
        load_trunk: Callable[[], ReferenceEngine],
        *,
        backend: Backend,
        packing: Packing,
        store: ReferenceStore | None = None,
    ) -> None:
        self.config = config.get_text_config()
        self.head = head
        self.packing = packing
        self.store = store
        self._backend = backend
        self._load_trunk = load_trunk
        self._engine: ReferenceEngine | None = None
        self.trunk_parameters = 0
        """Weights of the trunk that a token uses; what an exchange is judged by."""
        self.rates = slowest_rates(backend.ranks) if packing.exchange else None

    @classmethod
    def of_model(
        cls, model: PreTrainedModel, *, backend: Backend, offload: str, packing: Packing
    ) -> "Reference":
        """The reference of a model that is loaded already."""
        engine = backend.wrap_reference(
            ReferenceTrunk(model), offload=offload, rows=packing.rows_per_pass
        )
        head = head_of(model)
        reference = cls(model.config, head, lambda: engine, backend=backend, packing=packing)
        reference.trunk_parameters = used_parameters(model)
        return reference

    @property
    def state_size(self) -> int:
        """H_ref, what the head reads: of a few models less than their hidden size."""
        assert self.head.weight is not None
        return getattr(self.head.weight, "ds_shape", self.head.weight.shape)[1]

    @property
    def ranks(self) -> Ranks:
        """The ranks that run it together."""
        return self._backend.ranks

    @property
    def engine(self) -> ReferenceEngine:
        """What runs the trunk. Collectives on first use: those of loading it."""
        if self._engine is None:
            self._engine = self._load_trunk()
        return self._engine

    @region(REFERENCE_TRUNK)
    def open(
        self, rows: Sequence[Row], kl_coef: list[float] | Exception, *, micro_batches: int = 1
    ) -> Window:
        """A window over rows that share passes; an error is raised by all ranks on first reading.

        Collectives: see `Window`.
        """
        return Window(self, rows, kl_coef, micro_batches=micro_batches)

    def response_states(self, rows: Sequence[TokenRow], *, passes: int) -> list[Tensor]:
        """[t, H_ref] states that predict each row's response tokens, after the final norm.

        Longest rows first, so that those of a pass are of like length; each pass is trimmed to its
        own longest row. A rank with fewer rows than passes runs one dummy token in each pass that
        is left, so that every rank joins every collective. Collectives: the engine's, `passes`
        times.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
        size, found = self.packing.rows_per_pass, {}
        for begin in range(0, passes * size, size):
            group = order[begin : begin + size]
            found.update(zip(group, self._pass([rows[i] for i in group]), strict=True))
        return [found[i] for i in range(len(rows))]

    def _pass(self, rows: Sequence[TokenRow]) -> Sequence[Tensor]:
        device = self.ranks.device
        if not rows:
            dummy = torch.zeros(1, 1, dtype=torch.int64, device=device)
            self.engine(dummy)
            return []
        width = max(len(row.input_ids) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        index: list[int] = []
        counts: list[int] = []
        for place, row in enumerate(rows):
            length = len(row.input_ids)
            ids[place, :length] = torch.tensor(row.input_ids)
            # The hidden state at t - 1 predicts token t.
            own = [place * width + t - 1 for t in range(1, length) if row.loss_mask[t]]
            index += own
            counts.append(len(own))
        states = self.engine(to_device(ids, device)).flatten(0, 1)
        chosen = to_device(torch.tensor(index, dtype=torch.int64), device)
        return states.index_select(0, chosen).split(counts)

    def prompt_states(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after `num_layers` layers, which alone run. Collectives: the engine's."""
        return self.engine.prefix(input_ids, num_layers)

    @contextmanager
    def gathered_head(self, is_needed: bool) -> Iterator[Head]:
        """A block in which the head is whole; nothing is gathered where no rank needs it.

        Collectives: one all-gather per head parameter, if `is_needed`.
        """
        if not is_needed:
            yield NO_HEAD
            return
        with region(REFERENCE_HEAD), self._backend.gathered(self.head.parameters):
            yield self.head
