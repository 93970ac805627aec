"""`Call`: all arguments of one call that are no tensors, as one string that a graph can hold."""

from ast import literal_eval
from dataclasses import dataclass, fields
from functools import cache

import torch

from safereg_kernels.shard import VocabShard
from safereg_kernels.spec import LossSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How one call computes its loss, besides its tensors."""

    spec: LossSpec
    """The formula."""
    vocab_size: int | None = None
    """Number of tokens of the whole vocabulary; None = every column is one."""
    shard: VocabShard | None = None
    """Which columns are here; None = all."""
    has_metrics: bool = False
    """True where lse, entropy or accuracy are wanted of every active row."""
    ignore_index: int = -100
    """Label of a token without a cross-entropy."""
    chunk_tokens: int | None = None
    """Rows whose gradient is collected at a time; None = what `head_bytes` holds."""
    head_bytes: int | None = None
    """Bound on the bytes of logits and of their gradient; None = `budget.HEAD_BYTES`."""
    has_float32_head_grad: bool = False
    """True where the head's gradient must be float32, as a compiled graph has been told; else one
    that a single pass gives has the head's dtype at once."""
    logits_dtype_name: str = "float32"
    """Dtype of a chunk's logits."""

    @property
    def logits_dtype(self) -> torch.dtype:
        """`logits_dtype_name` as torch knows it."""
        return getattr(torch, self.logits_dtype_name)

    def encoded(self) -> str:
        """As a Python literal, in steps that a tracing compiler can follow."""
        own = _literals(self, [name for name in _NAMES if name not in ("spec", "shard")])
        shard = "None" if self.shard is None else _literals(self.shard, _SHARD_NAMES)
        return f"({_literals(self.spec, _SPEC_NAMES)}, {shard}, {own})"

    @staticmethod
    @cache
    def decoded(text: str) -> "Call":
        """From `encoded`."""
        spec, shard, own = literal_eval(text)
        shard = None if shard is None else VocabShard(**shard)
        return Call(spec=LossSpec(**spec), shard=shard, **own)


_NAMES = [field.name for field in fields(Call)]
_SPEC_NAMES = [field.name for field in fields(LossSpec)]
_SHARD_NAMES = [field.name for field in fields(VocabShard)]


def _literals(of: object, names: list[str]) -> str:
    pairs = []
    for name in names:
        pairs.append(f"'{name}': {getattr(of, name)!r}")
    return "{" + ", ".join(pairs) + "}"
