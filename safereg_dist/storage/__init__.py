"""What is kept on disk beside runs: atomic writes, and scores that outlive a run."""
