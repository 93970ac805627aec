"""Stage 5: the frozen reference, run on the rows that need it and on no others."""

from safereg_dist.reference.reference import NoReference, Reference
from safereg_dist.reference.trunk import ReferenceTrunk

__all__ = ["NoReference", "Reference", "ReferenceTrunk"]
