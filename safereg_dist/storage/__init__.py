"""Files on disk: atomic writes, and a cache of scores across runs."""
