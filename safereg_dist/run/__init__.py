"""The folder of a run: its files, its checkpoints, and the checks before a run begins."""
