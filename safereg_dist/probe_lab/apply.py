"""A fitted probe applied to raw rows, ahead of time, by the same code that reads it in training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from safereg_dist.config import DataConfig
from safereg_dist.data import load_tokenizer, tokenize_row
from safereg_dist.errors import DataError
from safereg_dist.parallel.single import SingleBackend, single_ranks
from safereg_dist.probe_lab.collect import positions_of
from safereg_dist.probe_lab.loading import load_model_of, load_probes_for
from safereg_dist.reference import EngineModel, Packing, Reference
from safereg_dist.risk.probe import Probe, rescale
from safereg_dist.risk.probe_risk import ReferenceProbeRisk
from safereg_dist.types import Row

_BATCH_SIZE = 16


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
    backend = SingleBackend(single_ranks())
    device = backend.ranks.device
    model, _ = load_model_of(probes, model_path, device=device, progress=progress)
    reference = Reference(
        EngineModel.of_model(model, backend=backend, offload="none", rows=batch_size),
        ranks=backend.ranks,
        packing=Packing(rows_per_pass=batch_size),
    )
    estimators = [
        ReferenceProbeRisk(
            probe.to(device), reference, ranks=backend.ranks, rows_per_pass=batch_size
        )
        for probe in probes
    ]
    risks = [0.0] * len(rows)
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i].input_ids))
    for begin in tqdm(range(0, len(order), batch_size), desc="probe", disable=not progress):
        chosen = order[begin : begin + batch_size]
        batch = [tokens[i] for i in chosen]
        found = [estimator(batch, in_first_epoch=True) for estimator in estimators]
        for place, values in zip(chosen, zip(*found, strict=True), strict=True):
            risks[place] = _combined(probes, values, place)
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
