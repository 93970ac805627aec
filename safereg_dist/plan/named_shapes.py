"""Sizes of well-known models, as published in their config.json: they are planned by name."""

import re
from typing import Any


def _fields(
    model_type: str, vocab: int, hidden: int, mlp: int, layers: int, heads: int, keys: int,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
NAMED_SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _fields("llama", 49152, 576, 1536, 30, 9, 3, **_TIED),
    "smollm2-1.7b": _fields("llama", 49152, 2048, 8192, 24, 32, 32, **_TIED),
    "llama-2-7b": _fields("llama", 32000, 4096, 11008, 32, 32, 32),
    "llama-2-70b": _fields("llama", 32000, 8192, 28672, 80, 64, 8),
    "llama-3.2-1b": _fields("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, **_TIED),
    "llama-3.2-3b": _fields("llama", 128256, 3072, 8192, 28, 24, 8, head_dim=128, **_TIED),
    "llama-3.1-8b": _fields("llama", 128256, 4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _fields("llama", 128256, 8192, 28672, 80, 64, 8),
    "llama-3.1-405b": _fields("llama", 128256, 16384, 53248, 126, 128, 8),
    "mistral-7b": _fields("mistral", 32000, 4096, 14336, 32, 32, 8),  # v0.1
    "mixtral-8x7b": _fields(
        "mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen2.5-0.5b": _fields("qwen2", 151936, 896, 4864, 24, 14, 2, **_TIED),
    "qwen2.5-3b": _fields("qwen2", 151936, 2048, 11008, 36, 16, 2, **_TIED),
    "qwen2.5-7b": _fields("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "qwen3-8b": _fields("qwen3", 151936, 4096, 12288, 36, 32, 8, head_dim=128),
    "qwen3-30b-a3b": _fields(
        *("qwen3_moe", 151936, 2048, 6144, 48, 32, 4),
        **{"moe_intermediate_size": 768, "head_dim": 128},
        **{"num_experts": 128, "num_experts_per_tok": 8},
    ),
    "phi-3.5-mini": _fields("phi3", 32064, 3072, 8192, 32, 32, 32),
    "gemma-2-9b": _fields("gemma2", 256000, 3584, 14336, 42, 16, 8, head_dim=256),
    "falcon-40b": {
        **{"model_type": "falcon", "vocab_size": 65024, "hidden_size": 8192},
        **{"num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8},
        **{"new_decoder_architecture": True, "bias": False},
    },
}
"""Name -> fields of config.json."""


def shape_name(model: str) -> str | None:
    """The name above that a model's hub id, or a name as it is typed, stands for; else None."""
    word = model.rpartition("/")[2].lower()
    tuned = re.fullmatch(r"(.+?)(?:-(?:instruct|chat|it|base|hf))*", word)
    return tuned[1] if tuned is not None and tuned[1] in NAMED_SHAPES else None
