"""Builds the objects of a run from a configuration; each is built here and nowhere else."""

from safereg_dist.factory.inputs import DEFAULT_STEPS, RowSources, build_sources
from safereg_dist.factory.model_folder import resolve_model
from safereg_dist.factory.prepare import prepare
from safereg_dist.factory.run import RiskContext, Run, build_risk_context, build_run, start_backend

__all__ = [
    "DEFAULT_STEPS",
    "RiskContext",
    "RowSources",
    "Run",
    "build_risk_context",
    "build_run",
    "build_sources",
    "prepare",
    "resolve_model",
    "start_backend",
]
