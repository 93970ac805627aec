"""An activation probe: logistic regression on one layer's hidden states, and its file format.

probability = sigmoid(weight . (pooled - mean) / scale + bias)
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from safereg_dist.errors import ProbeError

POOLINGS = ("last_prompt_token", "mean_prompt")
RESPONSE_POOLINGS = ("last_response_token", "mean_response")
_FORMAT = 1
_TENSORS = "probe.safetensors"
_FACTS = "probe.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fitted probe with the threshold it was calibrated for."""

    layer: int
    """Index into Hugging Face's `hidden_states`: 0 = embeddings, L = after the final norm."""
    pooling: str
    """`last_prompt_token` or `mean_prompt`."""
    mean: Tensor
    """[H] float32."""
    scale: Tensor
    """[H] float32, all positive."""
    weight: Tensor
    """[H] float32."""
    bias: float
    threshold: float
    """Probability from which a row counts as risky, in [0, 1]."""
    fingerprint: str
    """Weights of the model it was fitted on (`fingerprint.model_fingerprint`)."""
    position: str = "prompt"
    """`prompt` or `response`: which tokens of a row it reads."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the fit measured: metrics, data hash, recall asked for."""

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of everything that its probabilities depend on."""
        hasher = hashlib.sha256(f"{self.fingerprint} {self.layer} {self.pooling}".encode())
        for tensor in (self.mean, self.scale, self.weight, torch.tensor(self.bias)):
            hasher.update(tensor.float().cpu().numpy().tobytes())
        return hasher.hexdigest()

    def to(self, device: torch.device) -> "Probe":
        """The same probe with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("mean", "scale", "weight")}
        return replace(self, **moved)

    def probability(self, pooled: Tensor) -> Tensor:
        """[rows] float32 probability of harm for pooled states [rows, H] of any float dtype."""
        standardised = (pooled.float() - self.mean) / self.scale
        # A product and a sum, not `@`: autocast and TF32 would lower the precision of a matmul.
        logits = (standardised * self.weight).sum(-1) + self.bias
        return torch.sigmoid(logits)

    def save(self, folder: Path | str) -> None:
        """Writes `probe.safetensors` and, last, `probe.json`, each aside and renamed.

        Raises:
            ProbeError: the folder cannot be written; an older probe in it is not half replaced
                unnoticed, since `probe.json` holds the hash of its tensors.
        """
        tensors = {
            name: getattr(self, name).float().cpu().contiguous()
            for name in ("mean", "scale", "weight")
        }
        tensors["bias"] = torch.tensor([self.bias], dtype=torch.float32)
        packed = save(tensors)
        facts = {
            "format": _FORMAT,
            "layer": self.layer,
            "pooling": self.pooling,
            "position": self.position,
            "threshold": self.threshold,
            "fingerprint": self.fingerprint,
            "hidden_size": self.weight.numel(),
            "tensors_sha256": hashlib.sha256(packed).hexdigest(),
            "meta": dict(self.meta),
        }
        text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / _TENSORS, packed)
            _write(folder / _FACTS, text.encode("utf-8"))
        except OSError as err:
            raise ProbeError(
                f"cannot write the probe to {folder}: {err.strerror or err}: choose a writable "
                "folder with free space"
            ) from err

    @classmethod
    def load(cls, folder: Path | str) -> "Probe":
        """The probe of a folder that `save` wrote.

        Raises:
            ProbeError: missing or unreadable files, or files that do not belong together.
        """
        folder = Path(folder)
        if not (folder / _FACTS).is_file() or not (folder / _TENSORS).is_file():
            raise ProbeError(
                f"expected {_FACTS} and {_TENSORS} in {folder}: run `safereg probe fit --out "
                f"{folder}`, or correct risk.path"
            )
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            packed = (folder / _TENSORS).read_bytes()
            tensors = load(packed)
            probe = cls(
                layer=int(facts["layer"]),
                pooling=facts["pooling"],
                position=facts.get("position", "prompt"),
                mean=tensors["mean"],
                scale=tensors["scale"],
                weight=tensors["weight"],
                bias=float(tensors["bias"]),
                threshold=float(facts["threshold"]),
                fingerprint=facts["fingerprint"],
                meta=facts["meta"],
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as err:
            raise ProbeError(f"the probe in {folder} cannot be read ({err}): fit it again") from err
        shapes = {tuple(t.shape) for t in (probe.mean, probe.scale, probe.weight)}
        digest = hashlib.sha256(packed).hexdigest()
        fits = (
            facts.get("format") == _FORMAT
            and shapes == {(facts.get("hidden_size"),)}
            and facts.get("tensors_sha256", digest) == digest
            and isinstance(probe.fingerprint, str)
            and isinstance(probe.meta, dict)
            and all(t.is_floating_point() and t.isfinite().all() for t in tensors.values())
            and bool((probe.scale > 0).all())
        )
        if (
            not fits
            or probe.pooling not in (*POOLINGS, *RESPONSE_POOLINGS)
            or not 0 <= probe.threshold <= 1
        ):
            raise ProbeError(
                f"the files of the probe in {folder} do not belong together or are of another "
                f"format than {_FORMAT}: fit it again"
            )
        return probe


def _write(path: Path, content: bytes) -> None:
    """The whole file or nothing: a sibling first, which then takes the file's place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_model(
    probe: Probe, *, fingerprint: str, hidden_size: int, num_layers: int, force: bool
) -> None:
    """Raises ProbeError where the probe was fitted on other weights (unless forced).

    Hidden size and layer must fit even when forced.
    """
    if probe.weight.numel() != hidden_size or not 1 <= probe.layer <= num_layers:
        raise ProbeError(
            f"the probe reads {probe.weight.numel()} features of layer {probe.layer}, the model "
            f"has {hidden_size} and layers 1 to {num_layers}: fit a probe on this model"
        )
    if probe.fingerprint != fingerprint and not force:
        raise ProbeError(
            f"the probe was fitted on a model with fingerprint {probe.fingerprint[:12]}, this one "
            f"has {fingerprint[:12]}: fit a probe on this model, or set risk.force=true"
        )


def pool_prompt(
    hidden: Tensor,
    prompt_ends: Tensor,
    *,
    pooling: str,
    attention_mask: Tensor,
    row_index: Tensor | None = None,
) -> Tensor:
    """[N, H] pooled states of N prompts, which are the first `prompt_ends` real tokens of a row.

    Args:
        hidden: [B, S, H]; rows may be padded on the left or on the right.
        prompt_ends: [N] int64, tokens of each prompt, at least 1.
        pooling: `last_prompt_token` takes the last of them, `mean_prompt` their float32 mean.
        attention_mask: [B, S], 1 on real tokens.
        row_index: [N] row of each prompt (a conversation has several); None = prompt n is row n.
    Collectives: none, and no host synchronisation.
    """
    if row_index is None:
        row_index = torch.arange(hidden.shape[0], device=hidden.device)
    first = attention_mask.to(torch.int32).argmax(dim=1).index_select(0, row_index)
    return pool_spans(
        hidden, rows=row_index, first=first, last=first + prompt_ends - 1, pooling=pooling
    )


def pool_spans(
    hidden: Tensor, *, rows: Tensor, first: Tensor, last: Tensor, pooling: str
) -> Tensor:
    """[N, H] pooled states of N spans; a padded or packed row may hold any number of them.

    Args:
        hidden: [B, S, H].
        rows: [N] int64 row of each span.
        first: [N] int64 its first position in the padded row.
        last: [N] int64 its last position, included.
        pooling: `last_*` takes the last position, `mean_*` the float32 mean over the span.
    Collectives: none, and no host synchronisation.
    """
    if pooling.startswith("last_"):
        return hidden[rows, last]
    position = torch.arange(hidden.shape[1], device=hidden.device)
    inside = (position >= first[:, None]) & (position <= last[:, None])
    states = hidden.index_select(0, rows).float()
    # Filled, not multiplied by 0: a state at a padded position may be nan.
    return states.masked_fill(~inside[..., None], 0.0).sum(1) / (last - first + 1)[:, None]


def rescale(risk: float, threshold: float) -> float:
    """Risk on a scale on which every signal sets in at 0.5: piecewise linear, 0 and 1 stay.

    0.5 r / t below the threshold t, 0.5 + 0.5 (r - t) / (1 - t) from t on.
    """
    if risk < threshold:
        return min(0.5 * risk / threshold, _BELOW_HALF)
    return 0.5 + 0.5 * (risk - threshold) / (1 - threshold) if threshold < 1 else 1.0


_BELOW_HALF = math.nextafter(0.5, 0.0)  # rounding must not carry a row over the threshold


def load_probes(folder: Path | str) -> list[Probe]:
    """The probe of a folder, or the two of its folders `prompt` and `response`.

    Raises:
        ProbeError: neither is there, or one cannot be read.
    """
    both = [Path(folder) / position for position in ("prompt", "response")]
    if any(part.is_dir() for part in both) and not (Path(folder) / _FACTS).is_file():
        return [Probe.load(part) for part in both if part.is_dir()]
    return [Probe.load(folder)]
