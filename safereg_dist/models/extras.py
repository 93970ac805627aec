"""Modules that not every installation has, and the extra of safereg-dist that brings each."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from safereg_dist.errors import ConfigError

EXTRAS = {
    "train": (
        *("accelerate", "datasets", "datasketch", "deepspeed", "ninja", "scipy", "sklearn"),
        "tensorboard",
    ),
    "trl": ("trl",),
    "peft": ("peft",),
    "megatron": ("megatron",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "sign": ("cryptography",),
    "gguf": ("gguf",),
    "completion": ("shtab",),
    "eval": ("rouge_score",),
    "lm-eval": ("lm_eval",),
}
"""The modules that each extra of setup.py brings."""


def install(*modules: str) -> str:
    """The command that installs what brings these modules, e.g. `pip install "safereg-dist[trl]"`.

    Empty where no extra does.
    """
    extras = sorted(extra for extra, brought in EXTRAS.items() if {*modules} & {*brought})
    return f'pip install "safereg-dist[{",".join(extras)}]"' if extras else ""


def require(*modules: str) -> None:
    """Raises ConfigError where one of these modules is not installed; loads none."""
    with needed():
        for module in modules:
            if find_spec(module) is None:
                raise ModuleNotFoundError(name=module)


@contextmanager
def needed() -> Iterator[None]:
    """A block of imports; where a module of an extra is missing, a ConfigError says which."""
    try:
        yield
    except ModuleNotFoundError as err:
        missing = (err.name or "").partition(".")[0]
        if not install(missing):
            raise
        raise ConfigError(
            f"this needs {missing}, which is not installed: {install(missing)}"
        ) from err
