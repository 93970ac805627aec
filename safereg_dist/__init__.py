"""safereg_dist: fine-tune language models at scale and keep them safe (arXiv 2602.17546)."""

__version__ = "0.1.0"
