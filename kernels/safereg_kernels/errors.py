"""Errors of the kernel package; it knows nothing of `safereg_dist`, which re-exports them."""


class ShapeError(ValueError):
    """Tensors disagree on a size; the message names both sizes and the remedy."""
