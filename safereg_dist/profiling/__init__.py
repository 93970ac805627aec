"""FLOPs, bytes and seconds of training steps, by region (`profile: true`)."""

from safereg_dist.profiling.profile import NoProfiler, Profiler
from safereg_dist.profiling.recorder import PartCost, Recorder

__all__ = ["NoProfiler", "PartCost", "Profiler", "Recorder"]
