"""Stage 1, without reading text: what a step on the row would do to refusals of watched prompts."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from safereg_dist.config import InfluenceConfig
from safereg_dist.data.canary import Watched
from safereg_dist.errors import ConfigError
from safereg_dist.models.fingerprint import row_key
from safereg_dist.parallel.comm import Ranks, capture
from safereg_dist.regions import PROBE, region
from safereg_dist.risk.cached import CachedRisk, KnownRisks
from safereg_dist.risk.influence import Direction, Scale, direction_of, row_influence
from safereg_dist.risk.stage import ProbedStates, Risk
from safereg_dist.types import Head, Row, to_device


class WholeReference(Protocol):
    """Runs the whole reference, and lends its head (`reference.Reference`)."""

    def response_states(self, rows: Sequence[Row], *, passes: int) -> list[Tensor]:
        """[t, H] states that predict each row's response tokens; every rank asks for `passes`."""
        ...

    def gathered_head(self, is_needed: bool) -> AbstractContextManager[Head]:
        """A block in which the head is whole."""
        ...


class Watch(NamedTuple):
    """What is watched, and how."""

    rows: Watched
    settings: InfluenceConfig

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of everything that a risk depends on besides the row and the reference."""
        numbers = (self.settings.tokens_per_row, self.settings.false_positives)
        return hashlib.sha256(f"{self.rows.identity} {numbers}".encode()).hexdigest()


class InfluenceRisk(CachedRisk):
    """Risk from the influence of a row's worst token on refusals, at the frozen reference.

    0.5 is the influence that at most the share `false_positives` of the benign rows of `risk.path`
    reaches, in units of their standard deviation: it is calibrated on those and on nothing else. A
    row's risk is computed once and cached by its content.
    """

    name = "influence"

    def __init__(
        self,
        watch: Watch,
        reference: WholeReference,
        *,
        ranks: Ranks,
        rows_per_pass: int,
        head_bytes: int | None = None,
        known: KnownRisks | None = None,
    ) -> None:
        """`head_bytes`: memory for logits; None = the kernels' own bound."""
        super().__init__(watch, known=known)
        self._watch = watch
        self._reference = reference
        self._ranks = ranks
        self._rows_per_pass = rows_per_pass
        self._head_bytes = head_bytes
        self._found: tuple[Direction, Scale] | None = None

    def key_of(self, row: Row) -> str:
        """The key of all the row's tokens, and of which are the response's."""
        return row_key(row.input_ids, row.loss_mask)

    @region(PROBE)
    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """Cached risk, computed first where it is missing.

        Collectives: none after the first epoch; before that one 8-byte MAX all-reduce, and if a
        row is missing on any rank the reference's own, and an all-gather of its head. The first
        time those of the watched rows too, the same number on every rank. Errors as in
        `ReferenceProbeRisk`.
        """
        keys = self.keys(rows)
        if in_first_epoch:
            self._score_missing(rows, keys)
        return [None if key is None else self.cache[key] for key in keys]

    def _score_missing(self, rows: Sequence[Row], keys: list[str | None]) -> None:
        missing = capture(self.missing, keys)
        passes = self._ranks.max_over_ranks(missing.then(lambda places: self._passes(len(places))))
        if not passes:
            return
        if self._found is None:
            self._found = self._watched()
        direction, scale = self._found
        chosen = [rows[place] for place in missing.value]
        influence = self._influence(chosen, direction, passes)
        risks = [math.nan if value != value else scale.risk(value) for value in influence]
        self.learn({keys[i]: risk for i, risk in zip(missing.value, risks, strict=True)})

    def _watched(self) -> tuple[Direction, Scale]:
        """The direction and the scale, the same on every rank: each computes them itself."""
        refusing, complying, benign = self._watch.rows
        both = [*refusing, *complying]
        states = self._reference.response_states(both, passes=self._passes(len(both)))
        count = len(refusing)
        pairs = [
            (torch.cat(own), torch.cat(self._labels(rows)))
            for own, rows in ((states[:count], refusing), (states[count:], complying))
        ]
        with self._reference.gathered_head(True) as head:
            direction = direction_of(pairs[0], pairs[1], head)
        found = self._influence(benign, direction, self._passes(len(benign)))
        if not all(map(math.isfinite, found)):
            raise ConfigError(
                "the influence of the benign rows of risk.path is not finite: the reference gives "
                "states or logits that are not, or refuses and complies by the same tokens; check "
                "its weights, and `response` and `complying` of the harmful prompts"
            )
        return direction, Scale.of_benign(found, self._watch.settings.false_positives)

    def _influence(self, rows: Sequence[Row], direction: Direction, passes: int) -> list[float]:
        states = self._reference.response_states(rows, passes=passes)
        with self._reference.gathered_head(True) as head:
            if not rows:
                return []
            return row_influence(
                states,
                self._labels(rows),
                direction,
                head,
                tokens_per_row=self._watch.settings.tokens_per_row,
                head_bytes=self._head_bytes,
            )

    def _labels(self, rows: Sequence[Row]) -> list[Tensor]:
        """[t] the response tokens of each row."""
        return [
            to_device(torch.tensor(_response_tokens(row), dtype=torch.int64), self._ranks.device)
            for row in rows
        ]

    def _passes(self, count: int) -> int:
        return -(-count // self._rows_per_pass)


def _response_tokens(row: Row) -> list[int]:
    """The tokens that `Reference.response_states` gives states of."""
    return [row.input_ids[t] for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
