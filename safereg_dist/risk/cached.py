"""Risks that are computed once for each content: kept in memory, in checkpoints, on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safereg_dist.errors import CheckpointError
from safereg_dist.risk.stage import ProbedStates, Risk, RiskSource
from safereg_dist.storage.score_cache import CachedScore, ScoreCache
from safereg_dist.types import Row


class KnownRisks(NamedTuple):
    """Risks cached on disk across runs: text, reference and scorer are fixed."""

    cache: ScoreCache
    scorer: str
    """Names all that a risk depends on besides the row; see `scorer_name`."""


class Scorer(Protocol):
    """What gives a risk from the frozen reference and a row."""

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of everything in it that a risk depends on."""
        ...


def scorer_name(
    scorer: Scorer, reference_fingerprint: str, precision: str, *, kind: str = "probe"
) -> str:
    """Key of everything that a risk depends on besides the row."""
    return f"{kind} {scorer.identity} on {reference_fingerprint} {precision}"


class CachedRisk(RiskSource):
    """Risks from the frozen reference: neither text nor reference changes, so neither does a risk.

    This class knows what is missing and what has been learned; who computes a risk is a subclass's
    affair, or another's. A subclass says by `key_of` what of a row its risk depends on.
    """

    def __init__(self, scorer: Scorer, *, known: KnownRisks | None = None) -> None:
        self._scorer = scorer
        self._known = known
        self.cache: dict[str, float] = {}

    def key_of(self, row: Row) -> str:
        """SHA-256 (hex) of what is read of the row."""
        raise NotImplementedError

    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """Cached risk of every row; what is `missing` is learned before. Collectives: none."""
        return [None if key is None else self.cache[key] for key in self.keys(rows)]

    def keys(self, rows: Sequence[Row]) -> list[str | None]:
        """Key of each row's content; None on rows that have no risk."""
        return [self.key_of(row) if row.prompt_ends and not row.is_anchor else None for row in rows]

    def missing(self, keys: Sequence[str | None]) -> list[int]:
        """Index of the first row of each key that is cached neither in memory nor on disk."""
        found: dict[str, int] = {}
        for index, key in enumerate(keys):
            if key is not None and key not in self.cache:
                found.setdefault(key, index)
        if self._known is not None and found:
            stored = self._known.cache.get_many(self._known.scorer, list(found))
            self.cache.update({key: score.score for key, score in stored.items()})
            found = {key: index for key, index in found.items() if key not in stored}
        return list(found.values())

    def learn(self, new: Mapping[str | None, float | None]) -> None:
        """Keeps the risks of these keys."""
        self.cache.update(new)  # type: ignore[arg-type]
        good = {k: CachedScore(r, None) for k, r in new.items() if r is not None and r == r}
        if self._known is not None and good:  # a failed risk (nan) is not stored on disk
            self._known.cache.put_many(self._known.scorer, good)  # type: ignore[arg-type]

    def save_state(self, path: Path) -> None:
        """Writes the cache as safetensors: keys uint8 [n, 32] and risk float64 [n]."""
        keys = [list(bytes.fromhex(key)) for key in self.cache]
        tensors = {
            "keys": torch.tensor(keys, dtype=torch.uint8).reshape(-1, 32),
            "risk": torch.tensor(list(self.cache.values()), dtype=torch.float64),
        }
        save_file(tensors, path, metadata={"probe": self._scorer.identity})

    def load_state(self, path: Path) -> None:
        """Restores what `save_state` wrote.

        Raises:
            CheckpointError: the cache cannot be read, belongs to another scorer, or holds what is
                no risk.
        """
        state = read_state(path, self._scorer)
        keys, risk = state["keys"].numpy(), state["risk"].tolist()
        if len(keys) != len(risk) or any(value < 0 or value > 1 for value in risk):
            raise CheckpointError(
                f"the risk cache {path} holds values that are no risk in [0, 1]: it was changed or "
                "damaged; remove this checkpoint to resume from an earlier one"
            )
        self.cache = {key.tobytes().hex(): value for key, value in zip(keys, risk, strict=True)}

    def load_states(self, paths: Sequence[Path]) -> None:
        """Restores the risks that any of these ranks knew: its rows may now be another's.

        Raises:
            CheckpointError: as `load_state`.
        """
        together: dict[str, float] = {}
        for path in paths:
            self.load_state(path)
            together |= self.cache
        self.cache = together


def read_state(path: Path, scorer: Scorer) -> dict[str, Tensor]:
    """The tensors of a file that a source wrote beside a checkpoint, for this scorer.

    Raises:
        CheckpointError: it cannot be read, or belongs to another scorer.
    """
    try:
        with safe_open(path, framework="pt") as file:
            written_by = (file.metadata() or {}).get("probe")  # the first scorers were probes
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as err:
        raise CheckpointError(
            f"the risk cache {path} cannot be read ({err}): remove this checkpoint to resume "
            "from an earlier one"
        ) from err
    if written_by != scorer.identity:
        raise CheckpointError(
            f"{path} holds risks of another probe, or by other watched prompts, than those at "
            "risk.path: remove the checkpoint or restore the probe or the prompts"
        )
    return state
