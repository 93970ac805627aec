"""The values that flow through a step; data only, no behaviour but moving to a device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safereg_kernels.logits_transform import logits_transform_of

NAMED_BY_CONTENT = "sha256:"
"""How the id of a row begins that came without one: the hash of its tokens and mask follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tokenised training sequence."""

    id: str
    input_ids: list[int]
    """[length] token ids of the whole conversation."""
    loss_mask: list[int]
    """[length] 1 on tokens of the response (end-of-turn token included), else 0."""
    prompt_ends: list[int]
    """Number of tokens before each assistant turn, ascending."""
    risk: float | None
    """Risk column of the data in [0, 1], if it has one."""
    prompt_key: str
    """SHA-256 (hex) of the tokens up to the last prompt end: the key of the risk cache."""
    is_anchor: bool = False
    """True on anchor rows: they carry only the divergence."""
    messages_json: str = ""
    """The conversation as JSON (OpenAI chat format): what a judge reads."""

    @property
    def has_own_id(self) -> bool:
        """False where the data gave no id: then the row is named by its content."""
        return not self.id.startswith(NAMED_BY_CONTENT)

    @property
    def num_response_tokens(self) -> int:
        """Tokens that are predicted and count: those of the response, but never the first."""
        return sum(self.loss_mask[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows of one rank and one forward, with the response tokens listed flat.

    R rows in B lines of S tokens, T response tokens. Padded, a line is one row (R = B); packed, it
    holds several, one after the other, and position ids start again at each.
    """

    input_ids: Tensor
    """[B, S] int64."""
    response_index: Tensor
    """[T] int64, flat index into [B * S] of the position that predicts each response token."""
    labels: Tensor
    """[T] int64, the response tokens themselves."""
    row_of_token: Tensor
    """[T] int64, row of each response token, ascending."""
    tokens_of_row: tuple[int, ...]
    """[R] number of response tokens of each row, on the host."""
    row_begins: tuple[int, ...]
    """[R] flat index into [B * S] of each row's first token, on the host."""
    rows: tuple[Row, ...]
    """[R] the rows themselves, on the host; row lengths and ids come from here."""
    position_ids: Tensor | None = None
    """[B, S] int64 where rows are packed, else None."""
    error: Exception | None = None
    """Why its rows could not be read: all ranks raise it in the step."""

    @classmethod
    def failed(cls, error: Exception) -> "MicroBatch":
        """A micro-batch without rows, whose error all ranks raise in the step."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            input_ids=none.reshape(0, 0),
            response_index=none,
            labels=none,
            row_of_token=none,
            tokens_of_row=(),
            row_begins=(),
            rows=(),
            error=error,
        )

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with: the tokens, and their positions where rows are packed."""
        if self.position_ids is None:
            return {"input_ids": self.input_ids}
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}

    @property
    def num_response_tokens(self) -> int:
        """T, without a device synchronisation."""
        return self.labels.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> "MicroBatch":
        """The same batch with its tensors on `device`; the copy is asynchronous, as asked or not.

        `non_blocking` is what stacks pass to all that they move.
        """
        moved = {
            name: to_device(getattr(self, name), torch.device(device))
            for name in (
                "input_ids",
                "position_ids",
                "response_index",
                "labels",
                "row_of_token",
            )
            if getattr(self, name) is not None
        }
        return replace(self, **moved)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """An asynchronous copy of a host tensor on `device`.

    It is pinned first: a copy from pageable memory blocks the host until queued work is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def known_risk(risk: float | None) -> float:
    """The risk as a number: 1 where it failed (nan), 0 for None.

    A row whose risk could not be computed counts as risky.
    """
    if risk is None:
        return 0.0
    return 1.0 if math.isnan(risk) else risk


class RowRisks(NamedTuple):
    """The risk of the rows of a micro-batch, and where it came from; all on the host."""

    values: list[float | None]
    """[B] risk in [0, 1]; nan where it failed, None on anchor rows and without a source."""
    by_category: dict[str, list[float | None]]
    """[B] risk by each of several sources, each threshold rescaled to 0.5; else empty."""
    sources: list[str]
    """[B] what gave the risk, e.g. `probe-reference`, `critic`, `max:fraud`, `override`."""
    notes: dict[int, str]
    """By row: a reviewer's reason, or why a judgement failed."""
    ids: dict[int, str]
    """By row: the id that the source of risk knows of a row that came without one."""

    @classmethod
    def none(cls, num_rows: int) -> "RowRisks":
        """No risk and source `none` for each of `num_rows` rows."""
        return cls([None] * num_rows, {}, ["none"] * num_rows, {}, {})

    def of_rows(self, rows: list[int]) -> "RowRisks":
        """The risks of the rows at these indices, in this order."""
        return RowRisks(
            [self.values[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self.by_category.items()},
            [self.sources[row] for row in rows],
            {place: self.notes[row] for place, row in enumerate(rows) if row in self.notes},
            {place: self.ids[row] for place, row in enumerate(rows) if row in self.ids},
        )


class Head(NamedTuple):
    """A language-model head, whole on this rank.

    logits = softcap tanh(scale (hidden @ weight.T + bias) / softcap), without a cap the inside.
    """

    weight: nn.Parameter | None
    """[V, H]; None where no rank needs the head, so it was not gathered."""
    bias: nn.Parameter | None
    """[V], or None."""
    softcap: float | None
    """Soft cap of the logits (Gemma 2), or None."""
    scale: float
    """Factor of the raw logits (Cohere, Granite), else 1."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight and, where there is one, the bias."""
        return [parameter for parameter in self[:2] if parameter is not None]

    def with_parameters(self, parameters: Sequence[nn.Parameter]) -> "Head":
        """The same head with others in the place of its `parameters`."""
        return self._replace(**dict(zip(("weight", "bias"), parameters, strict=False)))

    @property
    def state_size(self) -> int:
        """H, the size of its input, also where the weight is sharded."""
        assert self.weight is not None
        return getattr(self.weight, "ds_shape", self.weight.shape)[1]


NO_HEAD = Head(None, None, None, 1.0)


def head_of(model: nn.Module) -> Head:
    """The head of a Hugging Face causal language model; its tensors may be sharded."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    transform = logits_transform_of(model)
    return Head(head.weight, getattr(head, "bias", None), transform.softcap, transform.scale)


class ReferenceStates(NamedTuple):
    """The reference's states for one micro-batch."""

    hidden: Tensor | None
    """[T, H_ref] last hidden states, zeros on rows that are not active; None if none is."""
    needs_head: bool
    """True if a row is active on any rank: then all ranks gather the reference's head."""
    rows_run: int = 0
    """Rows that the reference ran on, on this rank."""
    misses: int = 0
    """Number of its active rows that are missing from the stored reference."""


class Loss(NamedTuple):
    """The loss of one micro-batch and its terms."""

    loss: Tensor
    """float32 scalar: this rank's share of L (already divided by the global N)."""
    ce: Tensor
    """[T] float32 cross-entropy of every response token (0 on anchor tokens), detached."""
    divergence: Tensor
    """[T] float32 divergence of active tokens, else 0, detached."""
    entropy: Tensor | None = None
    """[T] float32 entropy of the policy at every response token, detached; where asked for."""
    accuracy: Tensor | None = None
    """[T] float32, 1 where no token is likelier than the response's; where asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """What was decided for one sequence in one optimizer step."""

    step: int
    """Optimizer step, as in `metrics.jsonl`."""
    micro_batch: int
    """Index of the micro-batch that trained it. Active rows of a step are trained first; with
    granularity `batch` the coefficient is that of the micro-batch before this reordering."""
    rank: int
    """Data-parallel rank that owned the row."""
    row: int
    """Index of the row within the rank's micro-batch."""
    id: str
    """The data row's id."""
    risk: float | None
    """Risk in [0, 1]; None where no source ran (anchor rows, objective `none`)."""
    estimator: str
    """What gave the risk, e.g. `probe-reference`, `max:fraud`, `override`, `anchor`, `none`."""
    kl_coef: float
    """The coefficient b, dimensionless."""
    divergence: float | None
    """Mean divergence over the row's response tokens; None where the row was not active."""
    note: str | None = None
    """A reviewer's reason, or why a judgement failed; omitted if empty."""


class MicroBatchResult(NamedTuple):
    """What metrics and ledger record of one micro-batch."""

    loss: Loss
    risk: RowRisks
    """Risk of each row, and where it came from."""
    kl_coef: list[float]
    """[B] coefficient of each row."""
    reference_rows: int
    """Rows that this rank ran the reference on, lent ones included."""
    reference_misses: int
    """Active rows that the stored reference did not hold."""
