"""safereg_dist: fine-tune language models at scale and keep them safe (arXiv 2602.17546).

What a training loop of one's own needs is loaded on first use:

    prepare           the regulariser of a model, from settings or from objects
    SafetyRegularizer its verbs: plan or open, loss_of, close, and save_state / load_state
    Row, row_of, collate, filler      training rows and the micro-batches made of them
    batch_of, RowColumns              the rows of a micro-batch that another collator made
    optimizer_step, load_config, build_run, start_backend      a whole run, step by step
    RiskSource, ReferenceModel        what to write for a risk, or a reference, of one's own
    SafeRegError      the base of all errors
"""

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safereg_dist.config import load_config as load_config
    from safereg_dist.data import RowColumns as RowColumns
    from safereg_dist.data import batch_of as batch_of
    from safereg_dist.data import collate as collate
    from safereg_dist.data import filler as filler
    from safereg_dist.data import row_of as row_of
    from safereg_dist.errors import SafeRegError as SafeRegError
    from safereg_dist.factory import build_run as build_run
    from safereg_dist.factory import prepare as prepare
    from safereg_dist.factory import start_backend as start_backend
    from safereg_dist.reference import ReferenceModel as ReferenceModel
    from safereg_dist.risk.stage import RiskSource as RiskSource
    from safereg_dist.step import SafetyRegularizer as SafetyRegularizer
    from safereg_dist.trainer import optimizer_step as optimizer_step
    from safereg_dist.types import Row as Row

__version__ = "0.1.0"

_HOMES = {
    "ReferenceModel": "reference",
    "RiskSource": "risk.stage",
    "Row": "types",
    "RowColumns": "data",
    "SafeRegError": "errors",
    "SafetyRegularizer": "step",
    "batch_of": "data",
    "build_run": "factory",
    "collate": "data",
    "filler": "data",
    "load_config": "config",
    "optimizer_step": "trainer",
    "prepare": "factory",
    "row_of": "data",
    "start_backend": "factory",
}

__all__ = [
    "ReferenceModel",
    "RiskSource",
    "Row",
    "RowColumns",
    "SafeRegError",
    "SafetyRegularizer",
    "__version__",
    "batch_of",
    "build_run",
    "collate",
    "filler",
    "load_config",
    "optimizer_step",
    "prepare",
    "row_of",
    "start_backend",
]


def loader(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names are loaded on first use, each from its module."""

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from safereg_dist.models.extras import needed

        with needed():
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return load


__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
