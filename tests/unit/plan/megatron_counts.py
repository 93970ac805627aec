"""What megatron-core builds on each rank of a layout; run as a script, which prints JSON.

    megatron_counts.py CASES

CASES is a JSON list of (fields of a config.json, {tp, pp, vpp, vocab, ends}). For each: the numbers
of parameters of every pipeline stage's first tensor-parallel rank, and its order of the schedule.
torch's `fake` backend stands in for the other ranks: nothing is sent.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `support`

from support import megatron_on_cpu

megatron_on_cpu.patch()

# ruff: noqa: E402 - the patch comes first
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

MICRO_BATCHES = 8


def main() -> None:
    found = [
        [rank_of(fields, size, stage) for stage in range(size["pp"])]
        for fields, size in json.loads(sys.argv[1])
    ]
    print(json.dumps(found))
    sys.stdout.flush()
    megatron_on_cpu.leave()


def rank_of(fields: dict[str, Any], size: dict[str, int], stage: int) -> dict[str, Any]:
    """Parameters of one rank by part, and its schedule."""
    tensor, stages, chunks = size["tp"], size["pp"], size.get("vpp", 1)
    dist.init_process_group(
        "fake", store=FakeStore(), rank=stage * tensor, world_size=tensor * stages
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    counts: dict[str, int] = {}
    for chunk in range(chunks):
        vp = {"vp_stage": chunk} if chunks > 1 else {}
        model = GPTModel(
            config_of(fields, size),
            get_gpt_layer_local_spec(
                normalization="RMSNorm", qk_layernorm=fields["model_type"] == "qwen3"
            ),
            vocab_size=size["vocab"],
            max_sequence_length=32,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **vp),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **vp),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=fields.get("tie_word_embeddings", False),
            **vp,
        )
        for name, parameter in model.named_parameters():
            counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    warmup = schedules.get_pp_rank_microbatches(MICRO_BATCHES, chunks, stages)[2]
    table = schedules.get_schedule_table(MICRO_BATCHES, chunks, stages)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return {"parameters": counts, "warmup": warmup, "table": table}


def part_of(name: str) -> str:
    if name.startswith("embedding"):
        return "embedding"
    if name.startswith("output_layer"):
        return "head"
    return "final norm" if "final_layernorm" in name else "layers"


def config_of(fields: dict[str, Any], size: dict[str, int]) -> TransformerConfig:
    ends = bool(size.get("ends"))
    return TransformerConfig(
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        num_attention_heads=fields["num_attention_heads"],
        num_query_groups=fields["num_key_value_heads"],
        kv_channels=fields.get("head_dim"),
        ffn_hidden_size=fields["intermediate_size"],
        add_bias_linear=False,
        add_qkv_bias=fields["model_type"] == "qwen2",
        qk_layernorm=fields["model_type"] == "qwen3",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        tensor_model_parallel_size=size["tp"],
        pipeline_model_parallel_size=size["pp"],
        virtual_pipeline_model_parallel_size=size.get("vpp"),
        pipeline_dtype=torch.float32,
        account_for_embedding_in_pipeline_split=ends,
        account_for_loss_in_pipeline_split=ends,
    )


if __name__ == "__main__":
    main()
