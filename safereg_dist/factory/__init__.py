"""From a configuration to the objects of a run; each is built here and nowhere else."""

from safereg_dist.factory.inputs import DEFAULT_STEPS, RowSources, build_sources, resolve_model
from safereg_dist.factory.run import Run, Screening, build_run, build_screening, start_backend

__all__ = [
    "DEFAULT_STEPS",
    "RowSources",
    "Run",
    "Screening",
    "build_run",
    "build_screening",
    "build_sources",
    "resolve_model",
    "start_backend",
]
