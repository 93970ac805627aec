"""The cases of the gate: those of production on a GPU, and small ones that the interpreter can do.

Vocabularies: 128256 (Llama 3, whole vectors), 151936 (Qwen, padded beyond its 151669 tokens) and
50257 (GPT-2, odd: no row but the first is aligned). Each case compiles its own kernels, which is
most of its time, so the options are spread over the cases, not multiplied.
"""

import torch
from device_truth import Formula
from gate_inputs import Case, LinearCase, LogitsCase, ShardCase

LLAMA, QWEN, GPT2 = 128256, 151936, 50257
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def production_cases() -> list[Case]:
    """For a GPU of 80 GB."""
    return [*_logits(), *_linear(), *_shards()]


def _logits() -> list[Case]:
    capped = Formula(policy_softcap=30.0, reference_softcap=25.0, policy_logit_scale=0.9)
    qwen = Formula(direction="reverse", vocab_size=151669)
    jsd = Formula(direction="jsd", beta=0.3, temperature=0.7)
    return [
        LogitsCase(name="masked_kl forward bf16", rows=1100, vocab=LLAMA),
        LogitsCase(
            name="masked_kl forward bf16 side stream", rows=1100, vocab=LLAMA, on_side_stream=True
        ),
        LogitsCase(name="masked_kl reverse bf16 padded", rows=600, vocab=QWEN, formula=qwen),
        LogitsCase(
            name="masked_kl l2 bf16 odd vocabulary",
            rows=800,
            vocab=GPT2,
            formula=Formula(direction="l2"),
        ),
        LogitsCase(name="masked_kl jsd bf16 T 0.7", rows=900, vocab=LLAMA, formula=jsd),
        LogitsCase(
            name="masked_kl forward fp32 T 2 wide rows",
            rows=600,
            vocab=LLAMA,
            dtype=FP32,
            formula=Formula(temperature=2.0),
            row_stride=LLAMA + 64,
        ),
        LogitsCase(
            name="masked_kl reverse fp16 odd offset",
            rows=600,
            vocab=GPT2,
            dtype=FP16,
            formula=Formula(direction="reverse"),
            row_stride=GPT2 + 7,
            offset=1,
        ),
        LogitsCase(
            name="masked_kl jsd fp32 odd stride",
            rows=600,
            vocab=LLAMA,
            dtype=FP32,
            formula=Formula(direction="jsd", beta=0.8),
            row_stride=LLAMA + 3,
        ),
        LogitsCase(name="masked_kl forward bf16 soft caps", rows=700, vocab=QWEN, formula=capped),
        LogitsCase(
            name="masked_kl reverse fp32 near",
            rows=600,
            vocab=LLAMA,
            dtype=FP32,
            formula=Formula(direction="reverse"),
            apart=0.01,
        ),
        LogitsCase(
            name="masked_kl forward bf16 beyond 2^31", rows=17000, vocab=LLAMA, rows_checked=8
        ),
    ]


def _linear() -> list[Case]:
    full = Formula(
        direction="reverse",
        temperature=0.7,
        z_loss=1e-3,
        policy_softcap=30.0,
        reference_softcap=30.0,
        vocab_size=151669,
    )
    return [
        LinearCase(
            name="linear forward bf16 host weights", rows=1100, vocab=LLAMA, weights_on_host=True
        ),
        LinearCase(
            name="linear forward bf16 side stream",
            rows=1100,
            vocab=LLAMA,
            weights_on_host=True,
            on_side_stream=True,
        ),
        LinearCase(
            name="linear reverse bf16 frozen",
            rows=700,
            vocab=QWEN,
            formula=Formula(direction="reverse"),
            is_head_trained=False,
        ),
        LinearCase(
            name="linear l2 bf16 odd vocabulary",
            rows=600,
            vocab=GPT2,
            formula=Formula(direction="l2"),
            has_bias=True,
        ),
        LinearCase(
            name="linear jsd bf16 none",
            rows=800,
            vocab=LLAMA,
            formula=Formula(direction="jsd", beta=0.3),
            reduction="none",
            chunk_tokens=300,
        ),
        LinearCase(name="linear forward fp32", rows=600, vocab=GPT2, dtype=FP32, hidden=64),
        LinearCase(name="linear forward fp16", rows=600, vocab=LLAMA, dtype=FP16),
        LinearCase(
            name="linear reverse bf16 every option",
            rows=700,
            vocab=QWEN,
            formula=full,
            has_bias=True,
        ),
        LinearCase(name="linear forward bf16 logits", rows=600, vocab=LLAMA, logits_dtype=BF16),
        LinearCase(
            name="linear reverse difference bf16 logits",
            rows=600,
            vocab=LLAMA,
            logits_dtype=BF16,
            is_difference=True,
            apart=0.3,
            is_head_trained=False,
            formula=Formula(direction="reverse"),
        ),
        LinearCase(
            name="linear forward difference",
            rows=600,
            vocab=LLAMA,
            is_difference=True,
            apart=0.3,
            is_head_trained=False,
        ),
        LinearCase(
            name="linear top-k T 2",
            rows=600,
            vocab=LLAMA,
            topk=64,
            formula=Formula(temperature=2.0),
        ),
    ]


def _shards() -> list[Case]:
    return [
        ShardCase(name="shards forward fp32", rows=600, vocab=LLAMA, dtype=FP32),
        ShardCase(
            name="shards reverse bf16 z-loss",
            rows=600,
            vocab=GPT2,
            formula=Formula(direction="reverse", temperature=0.7, z_loss=1e-3),
        ),
        ShardCase(
            name="shards jsd bf16",
            rows=600,
            vocab=LLAMA,
            formula=Formula(direction="jsd", beta=0.2),
        ),
        ShardCase(
            name="shards l2 bf16 padded",
            rows=600,
            vocab=QWEN,
            formula=Formula(direction="l2", vocab_size=151669),
        ),
        ShardCase(
            name="whole rows forward bf16 in place",
            rows=1100,
            vocab=LLAMA,
            parts=(1.0,),
            in_place=True,
        ),
    ]


def small_cases() -> list[Case]:
    """For the CPU: blocks of 256 columns, so that a row of 509 spans two, the last one partial."""
    capped = Formula(
        direction="reverse",
        policy_softcap=9.0,
        reference_softcap=20.0,
        policy_logit_scale=0.8,
        temperature=0.7,
        z_loss=0.01,
    )
    small = {"rows": 8, "vocab": 509, "dtype": FP32}
    return [
        ShardCase(
            name="whole rows reverse",
            **small,
            parts=(1.0,),
            formula=Formula(direction="reverse", temperature=0.7, z_loss=0.01),
        ),
        ShardCase(name="whole rows forward", **small, parts=(1.0,)),
        ShardCase(
            name="whole rows l2",
            **small,
            parts=(1.0,),
            formula=Formula(direction="l2", temperature=2.0),
        ),
        ShardCase(
            name="whole rows jsd",
            **small,
            parts=(1.0,),
            formula=Formula(direction="jsd", beta=0.2, temperature=2.0),
        ),
        ShardCase(name="whole rows soft caps", **small, parts=(1.0,), formula=capped),
        ShardCase(
            name="shards forward padded", **small, formula=Formula(vocab_size=500, z_loss=0.01)
        ),
        ShardCase(
            name="shards reverse T 0.7",
            **small,
            formula=Formula(direction="reverse", temperature=0.7),
        ),
        ShardCase(name="shards l2", **small, formula=Formula(direction="l2")),
        ShardCase(name="shards jsd", **small, formula=Formula(direction="jsd", beta=0.7)),
        ShardCase(
            name="rows beyond 2^31 in place",
            rows=5,
            vocab=509,
            parts=(1.0,),
            in_place=True,
            row_stride=2**29 + 8,
            offset=2**31,  # a kernel with 32-bit offsets reads there, not outside
        ),
        LogitsCase(name="masked_kl forward bf16", rows=8, vocab=509),
        LogitsCase(
            name="masked_kl reverse fp16 odd offset",
            rows=8,
            vocab=509,
            dtype=FP16,
            row_stride=517,
            offset=1,
            formula=Formula(direction="reverse"),
        ),
        LogitsCase(name="masked_kl forward near", **small, apart=0.01),
        LinearCase(
            name="linear forward",
            rows=14,
            vocab=509,
            dtype=FP32,
            hidden=16,
            has_bias=True,
            chunk_tokens=7,
            formula=Formula(vocab_size=500),
        ),
        LinearCase(
            name="linear difference",
            rows=8,
            vocab=509,
            dtype=FP32,
            hidden=16,
            is_difference=True,
            apart=0.3,
            is_head_trained=False,
            formula=Formula(direction="reverse"),
        ),
        LinearCase(
            name="linear top-k",
            rows=8,
            vocab=509,
            dtype=FP32,
            hidden=16,
            topk=5,
            formula=Formula(temperature=2.0),
        ),
    ]
