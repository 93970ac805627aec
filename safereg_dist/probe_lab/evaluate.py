"""`safereg probe evaluate`: what a fitted probe does on labelled data that it has not seen."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safereg_dist.config import DataConfig
from safereg_dist.data import load_tokenizer
from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import printable
from safereg_dist.probe_lab.collect import pooled_batches, positions_of
from safereg_dist.probe_lab.figures import draw_reliability, draw_roc
from safereg_dist.probe_lab.layer_fit import figures_with_intervals
from safereg_dist.probe_lab.loading import load_model_of, load_probes_for
from safereg_dist.probe_lab.near_duplicates import near_duplicate_groups
from safereg_dist.probe_lab.rows import ProbedRow, check_labels, read_examples, tokenize_examples
from safereg_dist.probe_lab.tables import print_figures
from safereg_dist.risk.probe import Probe, rescale
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import json_ready

BOTH_THRESHOLD = 0.5
"""The threshold of a risk rescaled by `risk.probe.rescale`."""


def evaluate_probe(
    probe_dir: Path,
    model_dir: Path,
    data_file: Path,
    out: Path,
    *,
    force: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Figures with 95 % intervals on labelled rows, written to `out`; figures beside it.

    Of a probe for prompts and one for responses, each is measured, and so is the larger risk of
    the two, scaled so that each threshold maps to 0.5. Returns what the file holds.

    Raises:
        ProbeError: no probe there, or (unless `force`) one of another model.
        ConfigError, DataError: the model or the data cannot be used; labels of one class only.
        CheckpointError: `out` cannot be written.
    """
    probes, config = load_probes_for(probe_dir, model_dir)
    position = "response" if any(p.position == "response" for p in probes) else "prompt"
    examples = read_examples(Path(data_file), position)
    check_labels(examples, data_file)
    tokenizer = load_tokenizer(str(model_dir), DataConfig(train=str(data_file)))
    limit = positions_of(config)
    rows = [tokenize_examples(tokenizer, examples, p.position, max_length=limit) for p in probes]
    model, fingerprint = load_model_of(
        probes, model_dir, force=force, device=device, progress=progress
    )
    risk = {
        probe.position: (_risks(probe, model, part, batch_size, progress), probe.threshold)
        for probe, part in zip(probes, rows, strict=True)
    }
    if len(probes) > 1:
        scaled = [[rescale(r, threshold) for r in values] for values, threshold in risk.values()]
        risk["both"] = np.max(scaled, axis=0), BOTH_THRESHOLD
    found = {
        "probe": str(probe_dir),
        "model": str(model_dir),
        "same_model": all(p.fingerprint == fingerprint for p in probes),
        "same_template": _same_template(probes, tokenizer),
        "data_sha256": hashlib.sha256(Path(data_file).read_bytes()).hexdigest(),
        **_figures(risk, examples, Path(out), seed),
    }
    found = json_ready(found)
    write_atomically(Path(out), json.dumps(found, indent=2, allow_nan=False) + "\n")
    _print(found, data_file)
    return found


def _risks(
    probe: Probe,
    model: PreTrainedModel,
    rows: Sequence[ProbedRow],
    batch_size: int,
    progress: bool,
) -> np.ndarray:
    risk = np.zeros(len(rows))
    batches = pooled_batches(
        model,
        rows,
        pooling=probe.pooling,
        layers=(probe.layer,),
        batch_size=batch_size,
        progress=progress,
    )
    for chosen, states in batches:
        risk[chosen] = probe.probability(states[0]).double().numpy()
    return risk


def _figures(
    risk: dict[str, tuple[np.ndarray, float]],
    examples: Sequence[LabelledPrompt],
    out: Path,
    seed: int,
) -> dict[str, Any]:
    labels = np.array([example.label == "harmful" for example in examples])
    texts = [" ".join(m["content"] for m in example.messages) for example in examples]
    groups = near_duplicate_groups(texts)
    found: dict[str, Any] = {
        "rows": len(labels),
        "harmful": int(labels.sum()),
        "groups": len(set(groups.tolist())),
        "probes": {},
    }
    for name, (values, threshold) in risk.items():
        measured = figures_with_intervals(values, labels, groups, threshold=threshold, seed=seed)
        found["probes"][name] = {"threshold": threshold, **measured}
        stem = out.with_suffix("") if len(risk) == 1 else out.with_suffix(f".{name}")
        draw_roc(values, labels, threshold, stem.with_name(f"{stem.name}.roc.png"))
        draw_reliability(values, labels, stem.with_name(f"{stem.name}.reliability.png"))
    return found


def _same_template(probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """Whether rows and fit used the same chat template; None if an old probe has no record."""
    known = {p.meta.get("template_sha256") for p in probes}
    if None in known:
        return None
    return known == {hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()}


def _print(found: dict[str, Any], data_file: Path) -> None:
    for name, measured in found["probes"].items():
        print(
            f"{printable(name)}: {found['rows']} rows of {printable(data_file)}, "
            f"{found['harmful']} harmful, threshold {measured['threshold']:.4f}"
        )
        print_figures(measured)
    if found["same_template"] is False:
        print("the chat template is not the one the probe was fitted with: risks may be off")
