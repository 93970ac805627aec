"""An activation probe: a small classifier on one layer's hidden states, and its file format.

z = (pooled - mean) / scale, and

    linear, direction    logit = weight . z + bias
    mlp                  logit = weight . relu(hidden_weight z + hidden_bias) + bias

probability = sigmoid(logit), or where the probe was calibrated by isotonic regression the piecewise
linear function through its knots (logit, probability).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from safereg_dist.errors import ProbeError, reason_of
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import parse_json
from safereg_dist.storage.seal import flaw_of, seal_of

POOLINGS = ("last_prompt_token", "mean_prompt", "both_prompt")
RESPONSE_POOLINGS = ("last_response_token", "mean_response", "both_response")
POOLINGS_OF = {"prompt": POOLINGS, "response": RESPONSE_POOLINGS}
"""Position -> its poolings: the last token's state, the mean over the span, one after the other."""
KINDS = ("linear", "mlp", "direction")
_FORMAT = 2
_READABLE = (1, 2)  # format 1 had linear probes on prompts only
_TENSORS = "probe.safetensors"
_FACTS = "probe.json"
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RuntimeError, SafetensorError),  # a RecursionError among them
)
"""What reading a file raises that anybody may have written."""
_TENSOR_FIELDS = ("mean", "scale", "weight", "hidden_weight", "hidden_bias", "knots_x", "knots_y")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fitted probe with the threshold it was calibrated for. H features, M hidden units.

    H is the model's hidden size, or twice that where the pooling is `both_*`.
    """

    layer: int
    """Index into Hugging Face's `hidden_states`: 0 = embeddings, L = after the final norm."""
    pooling: str
    """One of `POOLINGS_OF[position]`."""
    mean: Tensor
    """[H] float32."""
    scale: Tensor
    """[H] float32, all positive."""
    weight: Tensor
    """[H] float32; of an mlp [M]."""
    bias: float
    threshold: float
    """Probability from which a row counts as risky, in [0, 1]."""
    fingerprint: str
    """Weights of the model it was fitted on (`fingerprint.model_fingerprint`)."""
    position: str = "prompt"
    """`prompt` or `response`: which tokens of a row it reads."""
    kind: str = "linear"
    """`linear`, `mlp`, or `direction` (difference of class means, no weights fitted)."""
    hidden_weight: Tensor | None = None
    """[M, H] float32 of an mlp."""
    hidden_bias: Tensor | None = None
    """[M] float32 of an mlp."""
    knots_x: Tensor | None = None
    """[K] float32 logits, ascending, of an isotonic calibration; None = the sigmoid."""
    knots_y: Tensor | None = None
    """[K] float32 probabilities at the knots, never falling."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the fit: hashes of model, template and data, metrics, the recall's guarantee."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this kind of probe has, by name."""
        named = {name: getattr(self, name) for name in _TENSOR_FIELDS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of everything that its probabilities depend on."""
        reads = (self.fingerprint, self.layer, self.pooling, self.position, self.kind)
        hasher = hashlib.sha256(" ".join(map(str, reads)).encode())
        for name, tensor in {**self.tensors, "bias": torch.tensor(self.bias)}.items():
            hasher.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return hasher.hexdigest()

    def benign_share(self, low: float, high: float) -> float | None:
        """95 % upper bound of the share of benign rows with a probability in [low, high).

        From the calibration rows of the fit; None for a probe that was fitted without keeping them.
        """
        from scipy.stats import binomtest

        kept = self.meta.get("benign_risks")
        if not isinstance(kept, list) or not kept:
            return None
        inside = sum(low <= risk < high for risk in kept)
        return binomtest(inside, len(kept)).proportion_ci(0.9, method="exact").high

    def to(self, device: torch.device) -> "Probe":
        """The same probe with its tensors on `device`."""
        return replace(self, **{name: t.to(device) for name, t in self.tensors.items()})

    def logit(self, pooled: Tensor) -> Tensor:
        """[rows] float32 score before the calibration by knots, of pooled states [rows, H]."""
        features = (pooled.float() - self.mean) / self.scale
        if self.hidden_weight is not None and self.hidden_bias is not None:
            # float64: autocast and TF32 lower the precision of a matmul in float32.
            hidden = features.double() @ self.hidden_weight.double().T + self.hidden_bias
            features = torch.relu(hidden).float()
        return (features * self.weight).sum(-1) + self.bias  # not `@`: see above

    def probability(self, pooled: Tensor) -> Tensor:
        """[rows] float32 probability of harm for pooled states [rows, H] of any float dtype.

        Collectives: none, and no host synchronisation.
        """
        logit = self.logit(pooled)
        if self.knots_x is None or self.knots_y is None:
            return torch.sigmoid(logit)
        return _interpolate(logit, self.knots_x, self.knots_y)

    def save(self, folder: Path | str) -> None:
        """Writes `probe.safetensors` and, last, `probe.json`, each aside and renamed.

        Raises:
            ProbeError: the folder cannot be written. `load` detects a partly replaced probe, since
                `probe.json` holds the hash of the tensors, and a seal over itself.
        """
        tensors = {name: t.float().cpu().contiguous() for name, t in self.tensors.items()}
        tensors["bias"] = torch.tensor([self.bias], dtype=torch.float32)
        packed = save(tensors)
        facts = {
            "format": _FORMAT,
            "kind": self.kind,
            "position": self.position,
            "layer": self.layer,
            "pooling": self.pooling,
            "threshold": self.threshold,
            "fingerprint": self.fingerprint,
            "hidden_size": self.mean.numel(),
            "tensors_sha256": hashlib.sha256(packed).hexdigest(),
            "meta": dict(self.meta),
        }
        facts["seal"] = seal_of(_canonical(facts))
        text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / _TENSORS, packed)
            write_atomically(folder / _FACTS, text.encode("utf-8"))
        except OSError as err:
            raise ProbeError(
                f"cannot write the probe to {folder}: {err.strerror or err}: choose a writable "
                "folder with free space"
            ) from err

    @classmethod
    def load(cls, folder: Path | str, *, unsealed: bool = False) -> "Probe":
        """The probe of a folder that `save` wrote.

        Args:
            unsealed: also a folder whose seal does not hold, or that was written when there were
                none: for who looks at the probe himself (`safereg probe seal`).
        Raises:
            ProbeError: missing or unreadable files, files that do not belong together, or ones that
                were changed.
        """
        folder = Path(folder)
        if not (folder / _FACTS).is_file() or not (folder / _TENSORS).is_file():
            raise ProbeError(
                f"expected {_FACTS} and {_TENSORS} in {folder}: run `safereg probe fit --out "
                f"{folder}`, or correct risk.path"
            )
        try:
            facts = parse_json((folder / _FACTS).read_bytes())
            if not unsealed:
                _require_seal(folder, facts)
            packed = (folder / _TENSORS).read_bytes()
            tensors = load(packed)
            probe = cls(
                layer=int(facts["layer"]),
                pooling=facts["pooling"],
                position=facts.get("position", "prompt"),
                kind=facts.get("kind", "linear"),
                bias=float(tensors.pop("bias")),
                threshold=float(facts["threshold"]),
                fingerprint=facts["fingerprint"],
                meta=facts["meta"],
                **tensors,
            )
            digest = hashlib.sha256(packed).hexdigest()
            fits = (
                facts.get("format") in _READABLE
                and facts.get("hidden_size") == probe.mean.numel()
                and facts.get("tensors_sha256", digest if unsealed else None) == digest
                and _is_whole(probe)
            )
        except _UNREADABLE as err:
            raise ProbeError(
                f"the probe in {folder} cannot be read ({reason_of(err)}): fit it again"
            ) from err
        if not fits:
            raise ProbeError(
                f"the files of the probe in {folder} do not belong together or are of another "
                f"format than {_FORMAT}: fit it again"
            )
        return probe


def _canonical(facts: Mapping[str, Any]) -> bytes:
    """What the seal is over: all facts but the seal itself, however the file is laid out."""
    rest = {name: value for name, value in facts.items() if name != "seal"}
    return json.dumps(rest, sort_keys=True).encode()


def _require_seal(folder: Path, facts: dict[str, Any]) -> None:
    flaw = flaw_of(_canonical(facts), facts.get("seal"))
    if flaw is not None:
        raise ProbeError(
            f"{_FACTS} of the probe in {folder} cannot be believed ({flaw}): fit it again, or look "
            f"at what it says and accept it with `safereg probe seal {folder}`"
        )


def _is_whole(probe: Probe) -> bool:
    """Whether shapes and values are those of a probe of its kind."""
    size, units = probe.mean.numel(), probe.weight.numel()
    shapes = {"mean": (size,), "scale": (size,), "weight": (size,)}
    if probe.kind == "mlp":
        shapes |= {"weight": (units,), "hidden_weight": (units, size), "hidden_bias": (units,)}
    if probe.knots_x is not None:
        shapes |= dict.fromkeys(("knots_x", "knots_y"), (probe.knots_x.numel(),))
    tensors = probe.tensors
    return (
        {name: tuple(t.shape) for name, t in tensors.items()} == shapes
        and all(t.is_floating_point() and bool(t.isfinite().all()) for t in tensors.values())
        and math.isfinite(probe.bias)
        and bool((probe.scale > 0).all())
        and _are_knots(probe.knots_x, probe.knots_y)
        and probe.kind in KINDS
        and probe.pooling in POOLINGS_OF.get(probe.position, ())
        and isinstance(probe.fingerprint, str)
        and isinstance(probe.meta, dict)
        and 0 <= probe.threshold <= 1
    )


def _are_knots(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    in_range = bool(((y >= 0) & (y <= 1)).all())
    return x.numel() > 0 and in_range and all(bool((k.diff() >= 0).all()) for k in (x, y))


def _interpolate(value: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[n] y at the values, linear between the knots and level outside them; nan stays nan."""
    right = torch.searchsorted(x, value.contiguous()).clamp(max=x.numel() - 1)
    left = (right - 1).clamp(min=0)
    width = (x[right] - x[left]).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.lerp(y[left], y[right], ((value - x[left]) / width).clamp(0, 1))


def check_model(
    probe: Probe,
    *,
    fingerprint: str,
    hidden_size: int,
    num_layers: int,
    force: bool,
    adapter: str | None = None,
) -> None:
    """Raises ProbeError where the probe was fitted on other weights (unless forced).

    Hidden size and layer must fit even when forced. `adapter` is the one that is on in the model.
    """
    features = hidden_size * width_of(probe.pooling)
    if probe.mean.numel() != features or not 1 <= probe.layer <= num_layers:
        raise ProbeError(
            f"the probe reads {probe.mean.numel()} features of layer {probe.layer}, the model "
            f"has {features} and layers 1 to {num_layers}: fit a probe on this model"
        )
    if probe.fingerprint != fingerprint and not force and adapter is not None:
        raise ProbeError(
            f"the probe was fitted on a model with fingerprint {probe.fingerprint[:12]}, the "
            f"reference, the base model with the adapter {adapter!r} on, has {fingerprint[:12]}: "
            "fit a probe on the model with that adapter merged in, and set risk.force=true"
        )
    if probe.fingerprint != fingerprint and not force:
        raise ProbeError(
            f"the probe was fitted on a model with fingerprint {probe.fingerprint[:12]}, this one "
            f"has {fingerprint[:12]}: fit a probe on this model, or set risk.force=true (of "
            "`safereg probe evaluate`: --force)"
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
        pooling: `last_prompt_token` takes the last of them, `mean_prompt` their float32 mean,
            `both_prompt` ([N, 2H]) the one and then the other.
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
    """[N, H] (or 2H) pooled states of N spans; a padded or packed row may hold any number of them.

    In a packed row, pieces are kept apart by the forward, not here: transformers does so where
    position ids start again at each piece, without an attention mask and with use_cache=False.

    Args:
        hidden: [B, S, H].
        rows: [N] int64 row of each span.
        first: [N] int64 its first position in the padded row.
        last: [N] int64 its last position, included.
        pooling: `last_*` takes the last position, `mean_*` the float32 mean over the span,
            `both_*` ([N, 2H] float32) the one and then the other.
    Collectives: none, and no host synchronisation.
    """
    if pooling.startswith("last_"):
        return hidden[rows, last]
    every = torch.arange(hidden.shape[1], device=hidden.device)
    return pool_share(hidden, every, rows=rows, first=first, last=last, pooling=pooling)


def pool_share(
    hidden: Tensor, positions: Tensor, *, rows: Tensor, first: Tensor, last: Tensor, pooling: str
) -> Tensor:
    """[N, H] (or 2H) float32 what these positions of a sequence add to `pool_spans`.

    The sum over ranks that hold all positions once is the pooled states.

    Args:
        hidden: [B, S_own, H] states.
        positions: [S_own] int64 their places in the sequence, which `first` and `last` count in.
    Collectives: none, and no host synchronisation.
    """
    if pooling.startswith("both_"):
        each = {"rows": rows, "first": first, "last": last}
        parts = (pool_share(hidden, positions, **each, pooling=name) for name in POOLINGS[:2])
        return torch.cat([*parts], dim=-1)
    begin = last if pooling.startswith("last_") else first
    inside = (positions >= begin[:, None]) & (positions <= last[:, None])
    if begin is last:
        states = hidden[rows, inside.int().argmax(dim=1)].float()
        return states.masked_fill(~inside.any(dim=1)[:, None], 0.0)
    states = hidden.index_select(0, rows).float()
    # Filled, not multiplied by 0: a state at a padded position may be nan.
    return states.masked_fill(~inside[..., None], 0.0).sum(1) / (last - first + 1)[:, None]


def width_of(pooling: str) -> int:
    """How many states of a token's size a pooling gives: 2 for `both_*`, else 1."""
    return 2 if pooling.startswith("both_") else 1


def rescale(risk: float, threshold: float) -> float:
    """Maps a risk so that the threshold becomes 0.5: piecewise linear, 0 and 1 are fixed.

    0.5 r / t below the threshold t, 0.5 + 0.5 (r - t) / (1 - t) from t on.
    """
    if risk < threshold:
        return min(0.5 * risk / threshold, _BELOW_HALF)
    return 0.5 + 0.5 * (risk - threshold) / (1 - threshold) if threshold < 1 else 1.0


_BELOW_HALF = math.nextafter(0.5, 0.0)  # rounding must not move a row across the threshold


def load_probes(folder: Path | str) -> list[Probe]:
    """The probe of a folder, or the two of its folders `prompt` and `response`.

    Raises:
        ProbeError: neither is there, or one cannot be read.
    """
    return [Probe.load(part) for part in probe_folders(folder)]


def probe_folders(folder: Path | str) -> list[Path]:
    """The folder itself, or those of its folders `prompt` and `response` that there are."""
    both = [part for name in ("prompt", "response") if (part := Path(folder) / name).is_dir()]
    return both if both and not (Path(folder) / _FACTS).is_file() else [Path(folder)]
