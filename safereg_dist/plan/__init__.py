"""What a run costs before it is paid for: memory, FLOPs, bytes on each kind of link, time."""
