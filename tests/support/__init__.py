"""What tests share: models and files, launches, float64 oracles, a judge's server."""
