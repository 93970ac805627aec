"""The predicted cost of a run: memory, FLOPs, bytes on each kind of link, time."""
