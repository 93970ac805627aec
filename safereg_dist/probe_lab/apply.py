"""A fitted probe applied to raw rows, ahead of time, by the same code that reads it in training."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from safereg_dist.config import DataConfig
from safereg_dist.data import load_tokenizer, row_of, tokenize_row
from safereg_dist.errors import DataError
from safereg_dist.models.fingerprint import prompt_key
from safereg_dist.parallel.single import SingleBackend, single_ranks
from safereg_dist.probe_lab.collect import positions_of
from safereg_dist.probe_lab.loading import load_model_of, load_probes_for
from safereg_dist.reference import EngineModel, Packing, Reference
from safereg_dist.risk.probe import Probe, rescale
from safereg_dist.risk.probe_risk import ReferenceProbeRisk
from safereg_dist.screen.progress import progress_bar
from safereg_dist.types import Row

_BATCH_SIZE = 16
_READ_AHEAD = 1024
"""Texts that are sorted by their length, so that those of a batch are alike."""


def score_rows(
    probe_dir: Path,
    model_path: Path,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = _BATCH_SIZE,
    progress: bool = True,
) -> list[float]:
    """Risk in [0, 1] of each row, in one of the forms of `data.formats.FORMATS`.

    It is the largest over the row's assistant turns, scaled so that the probe's threshold maps to
    0.5, the default threshold of a column. A folder with a probe for prompts and one for responses
    gives the larger of the two.

    Raises:
        ProbeError: no probe there, or one of another model.
        ConfigError: the model or its tokenizer does not load.
        DataError: a row without an answer, longer than the model takes, or whose hidden states are
            not finite.
    """
    probes, config = load_probes_for(probe_dir, model_path)
    tokenizer = load_tokenizer(str(model_path), DataConfig(train=""))
    tokens = [
        tokenize_row(row, f"row {place + 1}", tokenizer, default_id=str(place))
        for place, row in enumerate(rows)
    ]
    _check_lengths(tokens, positions_of(config))
    loaded = _LoadedProbes(probes, model_path, batch_size=batch_size, progress=progress)
    return loaded.risks([tokens] * len(probes), progress=progress)


def score_texts(
    probe_dir: Path,
    model_path: Path,
    texts: Iterable[list[int]],
    *,
    total: int,
    batch_size: int = _BATCH_SIZE,
    progress: bool = True,
) -> Iterator[float]:
    """Yields the risk in [0, 1] of each text, which are tokens; a bounded number is read ahead.

    A probe on prompts reads a text as a prompt, one on responses as the answer to its first token.
    Risks are scaled as those of `score_rows`, errors are its.
    """
    probes, config = load_probes_for(probe_dir, model_path)
    limit = positions_of(config)
    loaded = _LoadedProbes(probes, model_path, batch_size=batch_size, progress=progress)
    rest = iter(texts)
    with progress_bar(total=total, desc="probe", unit=" texts", shown=progress) as bar:
        while group := list(islice(rest, _READ_AHEAD)):
            longest = max(map(len, group))
            if limit is not None and longest > limit:
                raise DataError(
                    f"a text has {longest} tokens, the model takes {limit}: score smaller pieces "
                    f"(--piece-tokens {limit})"
                )
            answers = [_as_answer(ids) for ids in group]
            prompts = [_as_prompt(row) for row in answers]
            views = [prompts if probe.position == "prompt" else answers for probe in probes]
            yield from loaded.risks(views, progress=False)
            bar.update(len(group))


def _as_answer(ids: list[int]) -> Row:
    """All but the first token; a text of one token is that."""
    return row_of("", ids, [0] * (len(ids) > 1) + [1] * max(len(ids) - 1, 1))


def _as_prompt(row: Row) -> Row:
    ends = [len(row.input_ids)]
    return replace(row, prompt_ends=ends, prompt_key=prompt_key(row.input_ids, ends))


class _LoadedProbes:
    """Probes with the model that they read."""

    def __init__(
        self, probes: Sequence[Probe], model_path: Path, *, batch_size: int, progress: bool
    ) -> None:
        self._probes, self._batch_size = probes, batch_size
        backend = SingleBackend(single_ranks())
        device = backend.ranks.device
        model, _ = load_model_of(probes, model_path, device=device, progress=progress)
        reference = Reference(
            EngineModel.of_model(model, backend=backend, offload="none", rows=batch_size),
            ranks=backend.ranks,
            packing=Packing(rows_per_pass=batch_size),
        )
        self._estimators = [
            ReferenceProbeRisk(
                probe.to(device), reference, ranks=backend.ranks, rows_per_pass=batch_size
            )
            for probe in probes
        ]

    def risks(self, views: Sequence[Sequence[Row]], *, progress: bool) -> list[float]:
        """The risk of each row, of which every probe has a view of its own."""
        rows = views[0]
        risks = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
        for begin in progress_bar(
            range(0, len(order), self._batch_size), desc="probe", shown=progress
        ):
            chosen = order[begin : begin + self._batch_size]
            found = [
                estimator([view[i] for i in chosen], in_first_epoch=True)
                for estimator, view in zip(self._estimators, views, strict=True)
            ]
            for place, values in zip(chosen, zip(*found, strict=True), strict=True):
                risks[place] = _combined(self._probes, values, place)
        for estimator in self._estimators:
            estimator.cache.clear()  # of texts there may be more than memory holds
        return risks


def _combined(probes: Sequence[Probe], values: Sequence[float | None], place: int) -> float:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or any(value != value for value in known):
        raise DataError(
            f"row {place + 1} has no finite risk, since hidden states at layer "
            f"{', '.join(str(probe.layer) for probe in probes)} are not finite: check the model's "
            "weights, or remove the row"
        )
    return max(rescale(v, probe.threshold) for v, probe in zip(known, probes, strict=True))


def _check_lengths(rows: Sequence[Row], limit: int | None) -> None:
    for place, row in enumerate(rows):
        if limit is not None and len(row.input_ids) > limit:
            raise DataError(
                f"row {place + 1} has {len(row.input_ids)} tokens, the model takes {limit}: "
                "shorten or remove it"
            )
