"""Hugging Face causal language models: where their modules are, and weight fingerprints."""
