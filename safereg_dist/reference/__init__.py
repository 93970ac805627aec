"""Stage 5: the frozen reference, run on the rows that need it and on no others."""

from safereg_dist.reference.reference import NoReference, Packing, Reference
from safereg_dist.reference.schedule import NoWindow, Window, active_rows
from safereg_dist.reference.trunk import ReferenceTrunk

__all__ = [
    "NoReference",
    "NoWindow",
    "Packing",
    "Reference",
    "ReferenceTrunk",
    "Window",
    "active_rows",
]
