"""Claimed: a converted GGUF file computes the logits of the model that it was written from.

The file is written here, tensor by tensor, as llama.cpp lays them out. Exact: float32 weights,
8-bit weights, tokens, chat template, the end of a turn, and what is refused.
"""

import gguf
import numpy as np
import pytest
import torch
from support.builders import PLAIN_TEMPLATE, tiny_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from safereg_dist.cli import main as safereg

LETTERS = sorted(ByteLevel.alphabet())
TOKENS = [*LETTERS, "ab", "<|begin|>", "<|end|>"]
BOS, EOS = len(TOKENS) - 2, len(TOKENS) - 1
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BLOCK = 32
"""Weights that share a step in 8 bits."""


@pytest.fixture(scope="module")
def model():
    return tiny_model(
        seed=7,
        vocab=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
    ).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key weight as llama.cpp rotates them: halves of a head side by side."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors(model):
    """(name in the file, array) of every weight."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    yield "output.weight", weights["lm_head.weight"]
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            found = weights[f"model.layers.{layer}.{ours}.weight"]
            turned = heads.get(ours.split(".")[-1])
            yield f"blk.{layer}.{theirs}.weight", interleaved(found, turned) if turned else found


def write(path, model, *, bits=32, architecture="llama", template=PLAIN_TEMPLATE, left_out=""):
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    special = gguf.TokenType.CONTROL
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(TOKENS) - 2) + [special, special])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    if template:
        writer.add_chat_template(template)
    for name, array in tensors(model):
        if name == left_out:
            continue
        if bits == 8 and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_8_bits(weight: torch.Tensor) -> torch.Tensor:
    """Each block of a matrix in steps of its largest weight over 127; the step is a half float."""
    if weight.ndim < 2:
        return weight
    blocks = weight.reshape(-1, BLOCK)
    step = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
    exact = blocks.abs().amax(1, keepdim=True) / 127
    return ((blocks / exact).round() * step).reshape(weight.shape)


@pytest.mark.parametrize("bits", [32, 8])
@torch.no_grad()
def test_a_converted_file_computes_the_same(model, tmp_path, bits, capsys):
    file, out = write(tmp_path / "m.gguf", model, bits=bits), tmp_path / "out"
    assert safereg(["convert-gguf", str(file), "--out", str(out), "--precision", "fp32"]) == 0
    assert f"written to {out}" in capsys.readouterr().out
    found, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out),
        AutoTokenizer.from_pretrained(out),
    )
    ids = tokenizer("grab a cab", add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0].tolist() == [TOKENS.index(t) for t in ("g", "r", "ab", "Ġ", "a", "Ġ", "c", "ab")]
    judge = LlamaForCausalLM(model.config).eval()
    kept = {k: in_8_bits(v) if bits == 8 else v for k, v in model.state_dict().items()}
    judge.load_state_dict(kept)
    want = judge(input_ids=ids).logits
    torch.testing.assert_close(found(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert found.generation_config.eos_token_id == [EOS]
    assert found.generation_config.bos_token_id == BOS
    found.save_pretrained(tmp_path / "again")  # a model that came from GGUF itself refuses this


def test_a_template_of_ones_own_and_half_the_bytes(model, tmp_path):
    file, out = write(tmp_path / "m.gguf", model, template=""), tmp_path / "out"
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}")
    given = ["convert-gguf", str(file), "--out", str(out), "--chat-template", str(template)]
    assert safereg(given) == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages[0].content }}"
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_what_is_refused(model, tmp_path, capsys):
    def said(file, *more, out=tmp_path / "none"):
        assert safereg(["convert-gguf", str(file), "--out", str(out), *more]) == 2
        return capsys.readouterr().err

    assert "cannot read" in said(tmp_path / "missing.gguf")
    no_file = tmp_path / "other.gguf"
    no_file.write_bytes(b"PK\x03\x04 a wheel")
    assert "is no GGUF file" in said(no_file)
    other = write(tmp_path / "o.gguf", model, architecture="nobody-knows-this")
    assert "transformers cannot read" in said(other)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(write(tmp_path / "w.gguf", model).read_bytes()[:20_000])
    assert "give a whole file" in said(cut)
    partial = write(tmp_path / "p.gguf", model, left_out="blk.1.ffn_up.weight")
    assert "lacks 1 weights" in said(partial)
    assert "no chat template" in said(write(tmp_path / "t.gguf", model, template=""))
    whole = write(tmp_path / "m.gguf", model)
    assert "cannot read" in said(whole, "--chat-template", str(tmp_path / "no.jinja"))
    (tmp_path / "there").mkdir()
    assert "is there already" in said(whole, out=tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"there"}
