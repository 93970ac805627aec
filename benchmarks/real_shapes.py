"""FLOPs of models of real size, whose modules run on the meta device: shapes, and no memory.

The trunks are Hugging Face's, stopped early by our own `reference.ReferenceTrunk`. The head's loss
needs values, so its products are counted in `bench_probe_flops.head_flops`.
"""

import functools
from unittest.mock import patch

import torch
from step_flops import Cost, counted
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaConfig,
    PretrainedConfig,
    masking_utils,
)

from safereg_dist.reference import ReferenceTrunk
from safereg_dist.risk.probe import Probe, pool_prompt

REAL_SHAPES: dict[str, PretrainedConfig] = {
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "Falcon-40B": FalconConfig(
        vocab_size=65024,
        hidden_size=8192,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_kv_heads=8,
        new_decoder_architecture=True,
        bias=False,
    ),
}
"""Dimensions as published with the models; weights are never made."""


class RealModel:
    """A model without weights, of which one row at a time is counted."""

    def __init__(self, shape: PretrainedConfig) -> None:
        self.shape = shape
        with torch.device("meta"):
            # Eager attention: the others look into the mask, which holds no values here.
            self._model = AutoModelForCausalLM.from_config(
                shape, dtype=torch.bfloat16, attn_implementation="eager"
            )

    @functools.cache  # noqa: B019 - a handful of models, for the length of the script
    def trunk(self, length: int) -> Cost:
        """Forward and backward of the trunk over a row of `length` tokens."""
        ids, mask = _tokens(length)

        def work() -> None:
            trunk = self._model.base_model
            output = trunk(input_ids=ids, attention_mask=mask, use_cache=False)
            output.last_hidden_state.sum().backward()

        cost = counted(work)
        self._model.zero_grad(set_to_none=True)
        return cost

    @torch.no_grad()
    def prefix(self, prompt: int, k: int) -> Cost:
        """The reference over the prompt's tokens, stopped after layer k."""
        trunk = ReferenceTrunk(self._model)
        # Whether rows are packed is asked of position ids, which hold no values here.
        with patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None):
            return counted(lambda: trunk(_tokens(prompt)[0], num_layers=k))

    def policy_probe(self, length: int, prompt: int, pooling: str) -> Cost:
        """Pooling and probability from states that are there already."""
        size = self.shape.hidden_size
        hidden = torch.empty(1, length, size, device="meta")
        probe = Probe(
            layer=1,
            pooling=pooling,
            mean=torch.empty(size, device="meta"),
            scale=torch.empty(size, device="meta"),
            weight=torch.empty(size, device="meta"),
            bias=0.0,
            threshold=0.5,
            fingerprint="",
        )
        ends, mask = torch.full((1,), prompt, device="meta"), _tokens(length)[1]
        return counted(
            lambda: probe.probability(
                pool_prompt(hidden, ends, pooling=pooling, attention_mask=mask)
            )
        )


def _tokens(length: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    return ids, torch.ones_like(ids)
