"""FLOPs, bytes and seconds of training steps, part by part (`profile: true`)."""

from safereg_dist.profiling.recorder import PartCost, Recorder

__all__ = ["PartCost", "Recorder"]
