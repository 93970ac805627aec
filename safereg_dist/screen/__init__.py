"""What a terminal shows of every verb: progress bars and aligned tables."""
