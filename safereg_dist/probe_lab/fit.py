"""`safereg probe fit`: a logistic regression per layer, the earliest good one, its threshold."""

import hashlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from safereg_dist.batch import load_tokenizer
from safereg_dist.config import DataConfig
from safereg_dist.errors import ConfigError, DataError, ProbeError
from safereg_dist.evaluate import write_atomically
from safereg_dist.evaluate.generate import load_model
from safereg_dist.fingerprint import model_fingerprint
from safereg_dist.parallel.shards import read_architecture
from safereg_dist.probe_lab.background import background_prompts
from safereg_dist.probe_lab.collect import collect_hidden_states
from safereg_dist.probe_lab.logistic import (
    FOLDS,
    cross_validated_l2,
    fit_logistic,
    fit_temperature,
)
from safereg_dist.probe_lab.scores import (
    auroc,
    average_precision,
    bootstrap_error,
    brier,
    flagged_fraction,
    log_loss,
)
from safereg_dist.probe_lab.threshold import recall_threshold
from safereg_dist.prompts import LabelledPrompt, read_prompts
from safereg_dist.risk.probe import POOLINGS, Probe

PARTS = ("fit", "calibrate", "hold_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What one layer's probe does on rows that took no part in its fit."""

    layer: int
    l2: float
    threshold: float
    conformal_threshold: float
    calibration_auroc: float
    calibration_auroc_error: float
    calibration_log_loss: float
    calibration_log_loss_error: float
    temperature: float
    auroc: float
    average_precision: float
    recall: float
    false_positive_rate: float
    background_false_positive_rate: float
    brier: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """A fitted probe and the sweep it came from."""

    probe: Probe
    layers: list[LayerReport]
    chosen: LayerReport


@dataclass(frozen=True, slots=True)
class _Rows:
    """Labels and parts of all rows; background rows are negatives."""

    harmful: np.ndarray
    background: np.ndarray
    part: np.ndarray
    fold: np.ndarray
    """Cross-validation fold inside the fit part."""
    is_first: np.ndarray
    """False on a repetition of an earlier row's text."""

    def where(self, part: str) -> np.ndarray:
        return self.part == PARTS.index(part)

    @property
    def calibration_positives(self) -> np.ndarray:
        """Harmful calibration rows, each text once: the guarantee counts independent rows."""
        return self.where("calibrate") & self.harmful & self.is_first


def fit_probe(
    model_dir: Path,
    data_file: Path,
    out_dir: Path,
    *,
    layers: list[int] | None = None,
    recall: float = 0.95,
    pooling: str = "last_prompt_token",
    background: int = 200,
    held_out_fraction: float = 0.2,
    seed: int = 0,
    batch_size: int = 32,
    device: str | None = None,
    progress: bool = True,
) -> FitReport:
    """Fits, calibrates and saves a probe; prints one line per layer.

    Rows are split into fit, calibration and hold-out, identical prompts together. The penalty is
    chosen by cross-validation inside the fit part; probabilities are temperature-scaled, and
    threshold and layer chosen, on the calibration part; metrics come from the hold-out.

    Args:
        layers: layers to try, 1 to the model's last; None = all.
        recall: share of harmful prompts to be flagged, in (0, 1).
        background: number of off-distribution negatives; 0 = none.
        held_out_fraction: share of the rows in the calibration part, and in the hold-out.
        device: None takes the first GPU where there is one, else the CPU.
    Raises:
        ConfigError, DataError, ProbeError: no such layer, labels of one class only, too few rows.
    """
    _check_options(recall, pooling, held_out_fraction, layers)
    read_architecture(Path(model_dir))  # a wrong path is told before the data is read
    labelled = _labelled(data_file)
    model, _ = load_model(model_dir, device=device, progress=progress)
    chosen_layers = _check_layers(layers, model.config.get_text_config().num_hidden_layers)
    tokenizer = load_tokenizer(str(model_dir), DataConfig(train=str(data_file)))
    negatives = background_prompts(tokenizer, labelled, count=background, seed=seed)
    rows = _split(labelled, negatives, held_out_fraction, seed)
    _check_enough(rows, recall, held_out_fraction)
    states = collect_hidden_states(
        model,
        tokenizer,
        labelled + negatives,
        pooling=pooling,
        batch_size=batch_size,
        progress=progress,
    )
    fits = [
        _fit_layer(states[layer], rows, layer, pooling, recall, seed)
        for layer in tqdm(chosen_layers, desc="fit layers", disable=not progress)
    ]
    reports = [report for report, _ in fits]
    chosen = _choose(reports)
    probe = replace(
        fits[reports.index(chosen)][1],
        fingerprint=model_fingerprint(model),
        meta={
            "model": str(model_dir),
            "data_sha256": hashlib.sha256(Path(data_file).read_bytes()).hexdigest(),
            "required_recall": recall,
            "calibration_positives": int(rows.calibration_positives.sum()),
            "background": int(rows.background.sum()),
            "rows": {part: int(rows.where(part).sum()) for part in PARTS},
            "seed": seed,
            "layers": [_json_numbers(asdict(report)) for report in reports],
        },
    )
    probe.save(out_dir)
    _draw_sweep(reports, chosen, Path(out_dir) / "probe.png")
    _print_sweep(reports, chosen, recall)
    return FitReport(probe=probe, layers=reports, chosen=chosen)


def _json_numbers(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts with None for nan, which JSON does not have."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in facts.items()}


def _check_options(
    recall: float, pooling: str, held_out_fraction: float, layers: list[int] | None
) -> None:
    if not 0 < recall < 1:
        raise ConfigError(f"--recall must lie in (0, 1), got {recall}: 0.95 is usual")
    if pooling not in POOLINGS:
        raise ConfigError(f"--pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if not 0 < held_out_fraction < 0.5:
        raise ConfigError(
            f"held_out_fraction must lie in (0, 0.5), got {held_out_fraction}: calibration and "
            "hold-out take as much each, the rest is fitted on"
        )
    if layers is not None and not layers:
        raise ConfigError("--layers names no layer: give numbers as 1,2,4, or `all`")


def _check_enough(rows: _Rows, recall: float, held_out_fraction: float) -> None:
    """Says before the model runs what the threshold would refuse after it has."""
    for part in PARTS:
        for harmful in (True, False):
            if not (rows.where(part) & (rows.harmful == harmful)).any():
                raise DataError(
                    f"too few {'harmful' if harmful else 'benign'} prompts: none is left for the "
                    f"part `{part}`: give at least {math.ceil(1 / held_out_fraction)} of each kind"
                )
    found = int(rows.calibration_positives.sum())
    needed = math.ceil(1 / (1 - recall) - 1e-9) - 1
    if found < needed:
        raise ProbeError(
            f"a recall of {recall} needs {needed} different harmful prompts for calibration, "
            f"about {math.ceil(needed / held_out_fraction)} in all, found {found} for it: give "
            "more harmful prompts or lower --recall"
        )


def _labelled(data_file: Path) -> list[LabelledPrompt]:
    prompts = read_prompts(data_file)
    unlabelled = [p.id for p in prompts if p.label is None]
    if unlabelled:
        raise DataError(
            f"{data_file}: {len(unlabelled)} rows have no `label`, the first is {unlabelled[0]!r}: "
            "label each harmful or benign"
        )
    harmful = sum(p.label == "harmful" for p in prompts)
    if not 0 < harmful < len(prompts):
        raise DataError(
            f"{data_file} has {harmful} harmful rows of {len(prompts)}: a probe needs both kinds"
        )
    return prompts


def _check_layers(layers: list[int] | None, last: int) -> list[int]:
    if layers is None:
        return list(range(1, last + 1))
    wrong = [layer for layer in layers if not 1 <= layer <= last]
    if wrong:
        raise ConfigError(f"the model has layers 1 to {last}, --layers asks for {wrong[0]}")
    return sorted(set(layers))


def _split(
    labelled: list[LabelledPrompt],
    negatives: list[LabelledPrompt],
    held_out_fraction: float,
    seed: int,
) -> _Rows:
    """Parts and folds by group of identical normalised text, in equal shares of each label.

    A group goes where its first row goes, also where its rows disagree about the label.
    """
    prompts = labelled + negatives
    harmful = np.array([p.label == "harmful" for p in prompts])
    background = np.array([False] * len(labelled) + [True] * len(negatives))
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(_normalised(prompt), []).append(index)
    is_first = np.zeros(len(prompts), dtype=bool)
    is_first[[group[0] for group in members.values()]] = True
    part, fold = np.zeros((2, len(prompts)), dtype=int)
    bounds = (1 - 2 * held_out_fraction, 1 - held_out_fraction)
    draw = np.random.default_rng(seed)
    for stratum in (harmful, ~harmful & ~background, background):
        groups = [group for group in members.values() if stratum[group[0]]]
        for place, chosen in enumerate(draw.permutation(len(groups))):
            part[groups[chosen]] = np.searchsorted(bounds, (place + 0.5) / len(groups))
            fold[groups[chosen]] = place % FOLDS
    return _Rows(harmful, background, part, fold, is_first)


def _normalised(prompt: LabelledPrompt) -> str:
    text = " ".join(message["content"] for message in prompt.messages)
    return " ".join(re.findall(r"\w+", text.lower()))


def _fit_layer(
    states: Tensor, rows: _Rows, layer: int, pooling: str, recall: float, seed: int
) -> tuple[LayerReport, Probe]:
    """What the layer's probe does, and the probe, still without its model's fingerprint."""
    fit, calibrate, hold_out = (rows.where(part) for part in PARTS)
    pooled, states = states, states.double()
    mean = states[fit].mean(0)
    # A feature that never moves says nothing; without the floor it would divide by zero.
    scale = states[fit].std(0).clamp_min(1e-6)
    features = (states - mean) / scale
    labels = torch.from_numpy(rows.harmful).double()
    l2 = cross_validated_l2(features[fit], labels[fit], rows.fold[fit])
    weight, bias = fit_logistic(features[fit], labels[fit], l2)
    logits = features @ weight + bias
    temperature = fit_temperature(logits[calibrate], labels[calibrate])
    probe = Probe(
        layer=layer,
        pooling=pooling,
        mean=mean.float(),
        scale=scale.float(),
        weight=(weight / temperature).float(),
        bias=float(bias / temperature),
        threshold=0.5,
        fingerprint="",
    )
    # Calibrated on what the stored float32 probe says, so that rounding cannot cost a row.
    probability = probe.probability(pooled).double().numpy()
    threshold, conformal = recall_threshold(
        probability[rows.calibration_positives], probability[calibrate & ~rows.harmful], recall
    )
    threshold = min(threshold, conformal)
    ask = ~rows.background  # metrics of ranking are over real prompts, background apart
    score = probability[calibrate & ask], rows.harmful[calibrate & ask]
    every = probability[calibrate], rows.harmful[calibrate]
    held = probability[hold_out & ask], rows.harmful[hold_out & ask]
    report = LayerReport(
        layer=layer,
        l2=l2,
        threshold=threshold,
        conformal_threshold=conformal,
        calibration_auroc=auroc(*score),
        calibration_auroc_error=bootstrap_error(auroc, *score, draws=50, seed=seed),
        calibration_log_loss=log_loss(*every),
        calibration_log_loss_error=bootstrap_error(log_loss, *every, draws=50, seed=seed),
        temperature=temperature,
        auroc=auroc(*held),
        average_precision=average_precision(*held),
        recall=flagged_fraction(probability[hold_out & rows.harmful], threshold),
        false_positive_rate=flagged_fraction(
            probability[hold_out & ask & ~rows.harmful], threshold
        ),
        background_false_positive_rate=flagged_fraction(
            probability[hold_out & rows.background], threshold
        ),
        brier=brier(*held),
    )
    return report, replace(probe, threshold=threshold)


def _choose(reports: list[LayerReport]) -> LayerReport:
    """The earliest layer within one bootstrap error of the best: early layers cost less to run.

    First by AUROC over real prompts, then by log loss over background rows too, both of the
    calibration part, so that the hold-out stays untouched by the choice.
    """
    best = max(reports, key=lambda r: r.calibration_auroc)
    bar = best.calibration_auroc - best.calibration_auroc_error
    good = [r for r in reports if r.calibration_auroc >= bar]
    best = min(good, key=lambda r: r.calibration_log_loss)
    bar = best.calibration_log_loss + best.calibration_log_loss_error
    return next(r for r in good if r.calibration_log_loss <= bar)


def _print_sweep(reports: list[LayerReport], chosen: LayerReport, recall: float) -> None:
    print("layer   AUROC  recall   FPR  background FPR   Brier  threshold")
    for r in reports:
        mark = " <- chosen" if r is chosen else ""
        print(
            f"{r.layer:5d}  {r.auroc:6.3f}  {r.recall:6.3f} {r.false_positive_rate:5.3f}"
            f"  {r.background_false_positive_rate:14.3f}  {r.brier:6.4f}  {r.threshold:9.4f}{mark}"
        )
    print(f"held-out rows; the threshold is calibrated for a recall of {recall}", flush=True)


def _draw_sweep(reports: list[LayerReport], chosen: LayerReport, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    layer = [r.layer for r in reports]
    axes.plot(layer, [r.auroc for r in reports], "o-", color="#0072B2", label="AUROC")
    axes.plot(layer, [r.recall for r in reports], "s-", color="#E69F00", label="recall")
    axes.plot(
        layer,
        [r.background_false_positive_rate for r in reports],
        "^-",
        color="#7F7F7F",
        label="background false positives",
    )
    axes.axvline(chosen.layer, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of held-out rows")
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(f"Layer {chosen.layer} is the earliest that separates as well as the best")
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    plt.close(figure)
    write_atomically(path, image.getvalue())
