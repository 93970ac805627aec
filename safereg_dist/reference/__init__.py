"""Stages 3 and 5: the frozen reference, run on the rows that need it and on no others."""

from safereg_dist.reference.base import Packing, ReferenceModel
from safereg_dist.reference.exchange import Exchange
from safereg_dist.reference.reference import (
    NoReference,
    Reference,
    ReferencePasses,
    ReferenceSchedule,
    active_rows,
)
from safereg_dist.reference.trunk import EngineModel, ReferenceTrunk

__all__ = [
    "EngineModel",
    "Exchange",
    "NoReference",
    "Packing",
    "Reference",
    "ReferenceModel",
    "ReferencePasses",
    "ReferenceSchedule",
    "ReferenceTrunk",
    "active_rows",
]
