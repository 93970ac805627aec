"""Small real things for tests: tokenizers, random models of several families, data files."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<asst>"]
VOCAB = len(SPECIAL) + len(WORDS)

TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<asst> ' }}"
    "{% generation %}{{ m['content'] + '<eos>' }}{% endgeneration %}"
    "{% else %}{{ '<user> ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<asst> ' }}{% endif %}"
)
PLAIN_TEMPLATE = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")

FAMILIES = ("llama", "falcon", "qwen", "mistral")


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over SPECIAL + WORDS with a chat template."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<asst>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(
    family: str = "llama", *, seed: int = 0, vocab: int = VOCAB, **changes
) -> PreTrainedModel:
    """A random model of the family: hidden 32, 3 layers, 4 heads, float32."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    small = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
    builders = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**common, **small, **changes})),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**{**common, **small, **changes})),
        "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**{**common, **small, **changes})),
        "falcon": lambda: FalconForCausalLM(FalconConfig(**{**common, **changes})),
    }
    return builders[family]().float()


EXPERTS = ("mixtral", "qwen3_moe")


def tiny_experts(family: str, *, seed: int = 0, **changes) -> PreTrainedModel:
    """A random mixture of five experts (`EXPERTS`): hidden 16, 2 layers, float32."""
    torch.manual_seed(seed)
    small = {
        **dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, moe_intermediate_size=24),
        **dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8),
        **dict(num_local_experts=5, num_experts=5, num_experts_per_tok=2, initializer_range=0.3),
        "max_position_embeddings": 64,
    }
    config = AutoConfig.for_model(family, **{**small, **changes})
    return AutoModelForCausalLM.from_config(config).float()


SCALED = {
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8, "sliding_window": 6},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
}
"""Families that scale or cap logits, and how far."""


def tiny_scaled(family: str, *, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of one of `SCALED`: hidden 16, 2 layers, float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        **dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, initializer_range=0.3),
        **dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
        **dict(bos_token_id=1, eos_token_id=2, pad_token_id=0),
        **{"max_position_embeddings": 64, **SCALED[family], **changes},
    )
    return AutoModelForCausalLM.from_config(config).float()


def save_model(folder: Path, model: PreTrainedModel, template: str | None = TEMPLATE) -> Path:
    """Saves model and word tokenizer as an ordinary Hugging Face folder."""
    model.save_pretrained(folder)
    word_tokenizer(template).save_pretrained(folder)
    return folder


def random_rows(count: int, *, seed: int = 0, risk: bool = True, longest: int = 9) -> list[dict]:
    """Rows with `prompt`, `response`, `id` and (half of them above 0.5) `risk`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def text(words: int) -> str:
        return " ".join(WORDS[draw(0, len(WORDS))] for _ in range(words))

    rows = []
    for index in range(count):
        row = {
            "id": f"row-{index:04d}",
            "prompt": text(draw(1, longest)),
            "response": text(draw(1, longest)),
        }
        if risk:
            row["risk"] = round(draw(0, 1001) / 1000, 3)
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_run(folder: Path, *, rows: int, **sections) -> Path:
    """`run.yaml` of a tiny model on so many rows with a risk column; `sections` are added to it."""
    run = {
        "model": str(save_model(folder / "model", tiny_model())),
        "data": {"train": str(write_jsonl(folder / "train.jsonl", random_rows(rows)))},
        "risk": {"estimator": "column", "max_held_back": 1.0},
        **sections,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(run))  # JSON is YAML
    return path


def config_fields(model_type, vocab, hidden, width, layers, heads, kv, **more):
    """A config.json of the usual form."""
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }
