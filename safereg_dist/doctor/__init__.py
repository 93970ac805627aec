"""What would fail, before a job is paid for: facts of every host, and what they mean for a run."""
