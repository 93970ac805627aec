"""Rivals that change a model after its training: weights between two models, and Safe LoRA.

    interpolation   W = W_0 + alpha (W_1 - W_0)          W_0 before, W_1 after training, all tensors
    Safe LoRA       W = W_0 + C (W_1 - W_0),  C = V V^T / |V|_F,  V = W_0 - W_u
                    for linear layers that moved away from V: cos(W_1 - W_0, C (W_1 - W_0)) is below
                    a threshold, or among the k lowest; norms are Frobenius's (arXiv 2405.16833)

W_u are the weights of the model before it was aligned. The paper projects the product of adapters;
here it is the difference of the weights, whatever trained them, in every `nn.Linear` of the decoder
layers: not the head, whose C would be a matrix of vocabulary by vocabulary. A layer that did not
change, in training or when the model was aligned, has no such cosine and stays as it is.

Tensors are read and written one file at a time, computed in float32 and kept in the dtype of W_1.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from safereg_dist.config.section import MODEL, Section
from safereg_dist.errors import ConfigError
from safereg_dist.models.architecture import build_model, decoder_layers, read_architecture
from safereg_dist.parallel.shards import tensor_shapes, weight_files
from safereg_dist.storage.atomic import whole_folder

REPORT = "after_training.json"
"""Written beside the weights: what was done, and the cosine of each layer."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


class SafeLora(Section):
    """Safe LoRA's projection; one of `threshold` and `layers`."""

    unaligned: Annotated[str, MODEL]
    """Folder of the model before it was aligned (Hugging Face, safetensors)."""
    threshold: float | None = Field(default=None, ge=-1, le=1)
    """Layers whose cosine is below it are projected, in [-1, 1]."""
    layers: int | None = Field(default=None, ge=1)
    """Number of layers with the lowest cosine to project, >= 1."""

    @model_validator(mode="after")
    def _check(self) -> "SafeLora":
        if (self.threshold is None) == (self.layers is None):
            raise ConfigError(
                f"safe_lora needs a threshold or a number of layers, got {self.threshold} and "
                f"{self.layers}: give one of them"
            )
        return self


class After(Section):
    """What is done to a trained model; one of the keys."""

    interpolate: float | None = None
    """alpha: 0 = the model before training, 1 = the trained one."""
    safe_lora: SafeLora | None = None
    """Safe LoRA's projection of what training changed."""

    @model_validator(mode="after")
    def _check(self) -> "After":
        if (self.interpolate is None) == (self.safe_lora is None):
            raise ConfigError("`after` needs interpolate or safe_lora, and one of them only")
        return self


def change_model(after: After, base: Path, tuned: Path, out: Path) -> None:
    """Writes the changed model to the folder `out`, whole or not at all, with a report.

    Raises:
        ConfigError: the models have other tensors or shapes than each other.
        CheckpointError: it cannot be written.
    """
    if after.interpolate is not None:
        interpolate(base, tuned, out, alpha=after.interpolate)
    else:
        assert after.safe_lora is not None
        safe_lora(base, tuned, out, after.safe_lora)


def interpolate(base: Path, tuned: Path, out: Path, *, alpha: float) -> None:
    """Writes W_0 + alpha (W_1 - W_0) of every tensor to `out`; raises as `change_model`."""
    with _Models(base, tuned) as models:

        def between(name: str) -> Tensor:
            before, after = models.read(name)
            # Exact at both ends, unlike before + alpha * (after - before).
            return torch.lerp(before, after, alpha)

        models.write(out, between, {"interpolate": alpha})


def safe_lora(base: Path, tuned: Path, out: Path, settings: SafeLora) -> None:
    """Writes the model with its layers projected as `settings` say; raises as `change_model`."""
    with _Models(base, tuned, Path(settings.unaligned)) as models:
        names = [name for name in linear_weights(tuned) if name in models.files]
        if not names:
            raise ConfigError(
                f"expected the weights of linear layers in the files of {tuned} by the names that "
                "the model has, found none: save it again with save_pretrained"
            )
        cosines = {}
        for name in names:  # no product is kept: a chosen one is computed again
            if (result := projected(*models.read(name))) is not None:
                cosines[name] = result[1]
        chosen = set(_chosen(cosines, settings))

        def project(name: str) -> Tensor:
            before, after, *_ = weights = models.read(name)
            result = projected(*weights) if name in chosen else None
            return after if result is None else before + result[0]

        report = {"safe_lora": settings.model_dump(), "projected": sorted(chosen)}
        models.write(out, project, {**report, "cosines": cosines})


def projected(base: Tensor, tuned: Tensor, unaligned: Tensor) -> tuple[Tensor, float] | None:
    """(C dW, cos(dW, C dW)) of one [out, in] matrix in float32; None where there is no cosine."""
    change, aligned = tuned - base, base - unaligned
    scale = aligned.norm()
    if not scale or not change.norm():
        return None
    kept = aligned @ (aligned.T @ change) / scale
    size = kept.norm() * change.norm()
    return (kept, float((kept * change).sum() / size)) if size else None


def _chosen(cosines: dict[str, float], settings: SafeLora) -> list[str]:
    if settings.threshold is not None:
        return [name for name, cosine in cosines.items() if cosine < settings.threshold]
    return sorted(cosines, key=lambda name: cosines[name])[: settings.layers]


def linear_weights(folder: Path) -> list[str]:
    """Names of the weights of all `nn.Linear` in the decoder layers of the model in a folder.

    Raises:
        ConfigError: the folder holds no causal language model with a list of decoder layers.
    """
    with torch.device("meta"):
        model: Any = build_model(read_architecture(folder))
    _, layers = decoder_layers(model)
    inside = {id(m) for m in layers.modules() if isinstance(m, nn.Linear)}
    return [f"{name}.weight" for name, m in model.named_modules() if id(m) in inside]


class _Models(ExitStack):
    """Folders with the same tensors, read one tensor of each at a time; the second is written."""

    def __init__(self, *folders: Path) -> None:
        super().__init__()
        self._folders = folders
        found = [weight_files(folder) for folder in folders]
        self.files = found[1]
        shapes = [tensor_shapes(files) for files in found]
        for folder, own in zip(folders, shapes, strict=True):
            names = own.keys() ^ shapes[1].keys() or {n for n in own if own[n] != shapes[1][n]}
            if names:
                name = min(names)
                raise ConfigError(
                    f"expected the same tensors in {folder} and {folders[1]}, got {name!r} as "
                    f"{own.get(name)} and {shapes[1].get(name)} ({len(names)} differ): both must "
                    "be of one architecture, saved the same way"
                )
        self._found: list[dict[str, Path]] = found
        self._handles: dict[Path, Any] = {}

    def read(self, name: str) -> list[Tensor]:
        """The tensor of each model, float32."""
        return [self._handle(files[name]).get_tensor(name).float() for files in self._found]

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = self.enter_context(safe_open(file, framework="pt"))
        return self._handles[file]

    def write(self, out: Path, change: Callable[[str], Tensor], report: dict[str, Any]) -> None:
        """The second folder with every tensor changed, and the report, as the folder `out`."""
        tuned = self._folders[1]
        with whole_folder(out) as aside:
            for file in tuned.iterdir():
                if file.is_file() and file.suffix not in _WEIGHTS:
                    shutil.copy2(file, aside)
            for path in sorted(set(self.files.values())):
                changed = {}
                for name in (n for n, file in self.files.items() if file == path):
                    kept = self._handle(path).get_tensor(name)
                    # Whole numbers are counts or masks, which training does not move.
                    is_weight = kept.is_floating_point()
                    changed[name] = change(name).to(kept.dtype) if is_weight else kept
                save_file(changed, aside / path.name, metadata={"format": "pt"})
            folders = {"models": [str(folder) for folder in self._folders]}
            text = json.dumps({**folders, **report}, indent=2) + "\n"
            (aside / REPORT).write_text(text, encoding="utf-8")
