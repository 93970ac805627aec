"""Hugging Face causal language models: where their parts are, and what names their weights."""
