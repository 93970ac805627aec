"""Stage 3, with a probe: risk from hidden states of the policy or of the frozen reference."""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.risk.estimator import Risk
from safereg_dist.risk.probe import Probe, pool_prompt
from safereg_dist.types import MicroBatch


class PolicyProbeRisk:
    """A probe on the policy's hidden states of this very forward: free, but it drifts."""

    name = "probe-policy"

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def __call__(self, batch: MicroBatch, policy_states: Tensor | None) -> Risk:
        """Largest probability over a row's assistant turns. Collectives: none; one host sync."""
        assert policy_states is not None
        rows, ends = _scored_turns(batch, range(len(batch.rows)))
        probability = _probe_turns(
            self._probe, policy_states, batch.attention_mask, rows=rows, ends=ends
        )
        return _max_per_row(len(batch.rows), rows, probability)


class PromptTrunk(Protocol):
    """Runs the reference's first layers (`reference.Reference`)."""

    def prompt_states(self, input_ids: Tensor, attention_mask: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after `num_layers` layers; every rank calls it the same number of times."""
        ...


class ReferenceProbeRisk:
    """A probe on the frozen reference, run over prompt tokens up to the probed layer only.

    Neither text nor reference changes, so a row's risk is computed once and cached by its content.
    """

    name = "probe-reference"

    def __init__(
        self, probe: Probe, reference: PromptTrunk, *, ranks: Ranks, rows_per_pass: int
    ) -> None:
        self._probe = probe
        self._reference = reference
        self._ranks = ranks
        self._rows_per_pass = rows_per_pass
        self.cache: dict[str, float] = {}

    def __call__(self, batch: MicroBatch, policy_states: Tensor | None) -> Risk:
        """Cached risk, computed first where it is missing.

        Collectives: none once every rank has seen all its rows; before that one 8-byte MAX
        all-reduce, and the reference's own for the layers run.
        """
        if batch.may_be_new:
            missing = self._missing(batch)
            passes = self._ranks.agree_on_passes(-(-len(missing) // self._rows_per_pass))
            for i in range(passes):
                self._score(batch, missing[i * self._rows_per_pass : (i + 1) * self._rows_per_pass])
        return [
            self.cache[row.content_key] if row.prompt_ends and not row.is_anchor else None
            for row in batch.rows
        ]

    def _missing(self, batch: MicroBatch) -> list[int]:
        """First row of each content that is not cached."""
        found: dict[str, int] = {}
        for index, row in enumerate(batch.rows):
            if row.prompt_ends and not row.is_anchor and row.content_key not in self.cache:
                found.setdefault(row.content_key, index)
        return list(found.values())

    def _score(self, batch: MicroBatch, group: list[int]) -> None:
        device = batch.input_ids.device
        if not group:
            dummy = torch.zeros(1, 1, dtype=torch.int64, device=device)
            self._reference.prompt_states(dummy, torch.ones_like(dummy), self._probe.layer)
            return
        width = max(batch.rows[index].prompt_ends[-1] for index in group)
        index = torch.tensor(group).to(device, non_blocking=True)
        mask = batch.attention_mask.index_select(0, index)[:, :width]
        states = self._reference.prompt_states(
            batch.input_ids.index_select(0, index)[:, :width], mask, self._probe.layer
        )
        rows, ends = _scored_turns(batch, group)
        probability = _probe_turns(self._probe, states, mask, rows=rows, ends=ends)
        for index_, value in zip(group, _max_per_row(len(group), rows, probability), strict=True):
            assert value is not None
            self.cache[batch.rows[index_].content_key] = value

    def save_cache(self, path: Path) -> None:
        """Writes the cache as safetensors: keys uint8 [n, 32] and risk float64 [n]."""
        keys = [list(bytes.fromhex(key)) for key in self.cache]
        tensors = {
            "keys": torch.tensor(keys, dtype=torch.uint8).reshape(-1, 32),
            "risk": torch.tensor(list(self.cache.values()), dtype=torch.float64),
        }
        save_file(tensors, path, metadata={"probe": _identity(self._probe)})

    def load_cache(self, path: Path) -> None:
        """Restores what `save_cache` wrote.

        Raises:
            CheckpointError: the cache cannot be read, or belongs to another probe.
        """
        try:
            with safe_open(path, framework="pt") as file:
                written_by = (file.metadata() or {}).get("probe")
                keys = file.get_tensor("keys").numpy()
                risk = file.get_tensor("risk").tolist()
        except (OSError, SafetensorError) as err:
            raise CheckpointError(
                f"the risk cache {path} cannot be read ({err}): remove this checkpoint to resume "
                "from an earlier one"
            ) from err
        if written_by != _identity(self._probe):
            raise CheckpointError(
                f"{path} holds risks of another probe than the one at risk.path: remove the "
                "checkpoint or restore the probe"
            )
        self.cache = {key.tobytes().hex(): value for key, value in zip(keys, risk, strict=True)}


def _identity(probe: Probe) -> str:
    """SHA-256 (hex) of everything that a probe's probabilities depend on."""
    hasher = hashlib.sha256(f"{probe.fingerprint} {probe.layer} {probe.pooling}".encode())
    for tensor in (probe.mean, probe.scale, probe.weight, torch.tensor(probe.bias)):
        hasher.update(tensor.float().cpu().numpy().tobytes())
    return hasher.hexdigest()


class _Turns(NamedTuple):
    rows: list[int]
    """Position of each turn's row among the rows asked for."""
    ends: list[int]
    """Tokens before each turn."""


def _scored_turns(batch: MicroBatch, rows: "range | list[int]") -> _Turns:
    turns = _Turns([], [])
    for place, index in enumerate(rows):
        row = batch.rows[index]
        if not row.is_anchor:
            turns.rows.extend([place] * len(row.prompt_ends))
            turns.ends.extend(row.prompt_ends)
    return turns


def _probe_turns(
    probe: Probe, states: Tensor, attention_mask: Tensor, *, rows: list[int], ends: list[int]
) -> list[float]:
    if not rows:
        return []
    device = states.device
    pooled = pool_prompt(
        states,
        torch.tensor(ends).to(device, non_blocking=True),
        pooling=probe.pooling,
        attention_mask=attention_mask,
        row_index=torch.tensor(rows).to(device, non_blocking=True),
    )
    return probe.probability(pooled).tolist()


def _max_per_row(num_rows: int, rows: list[int], probability: list[float]) -> Risk:
    """The riskiest turn of each row; nan (a failed turn) wins over any number."""
    risk: Risk = [None] * num_rows
    for row, value in zip(rows, probability, strict=True):
        known = risk[row]
        if known is None or math.isnan(value) or value > known:
            risk[row] = value
    return risk
