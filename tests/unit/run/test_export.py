"""Claimed: the export is a plain Hugging Face folder, gathered one layer at a time, cut into shards
of bounded size, and whole or absent.

Exact: tensors, names, what is gathered at once. The backend is the real single-process one; a
wrapper around it notes what is asked for.
"""

import json
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from support.builders import FAMILIES, tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from safereg_dist.errors import CheckpointError
from safereg_dist.parallel.single import SingleBackend, single_ranks
from safereg_dist.run.export import export_model

LIMIT = 40_000


class NotedBackend:
    """The single-process backend; remembers the size of every gathered group."""

    def __init__(self):
        self._backend = SingleBackend(single_ranks())
        self.ranks = self._backend.ranks
        self.gathered_bytes = []

    @contextmanager
    def gathered(self, parameters):
        parameters = list(parameters)
        self.gathered_bytes.append(sum(p.numel() * p.element_size() for p in parameters))
        with self._backend.gathered(parameters) as whole:
            yield whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_export_loads_and_never_gathers_more_than_a_layer(family, tied, tmp_path):
    model = tiny_model(family, tie_word_embeddings=tied)
    backend = NotedBackend()
    out = tmp_path / "model"
    export_model(model, word_tokenizer(), out, backend=backend, shard_bytes=LIMIT)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (name, a), (other, b) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b), name
    layer = max(
        sum(p.numel() * 4 for n, p in model.named_parameters() if f".{i}." in n) for i in range(3)
    )
    embedding = model.get_input_embeddings().weight.numel() * 4
    assert max(backend.gathered_bytes) <= max(layer, embedding)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    headers = 4096  # names and shapes
    assert all(shard.stat().st_size <= max(LIMIT, embedding) + headers for shard in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert AutoTokenizer.from_pretrained(out).get_vocab() == word_tokenizer().get_vocab()
    assert not list(tmp_path.glob(".*"))


def test_the_generation_config_is_exported(tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.25, max_new_tokens=17, eos_token_id=[2, 5], pad_token_id=0
    )
    out = tmp_path / "model"
    export_model(model, word_tokenizer(), out, backend=NotedBackend(), shard_bytes=LIMIT)
    loaded = AutoModelForCausalLM.from_pretrained(out).generation_config
    for name in ("do_sample", "temperature", "max_new_tokens", "eos_token_id", "pad_token_id"):
        assert getattr(loaded, name) == getattr(model.generation_config, name), name


def test_export_replaces_an_older_one(tmp_path):
    backend, out = NotedBackend(), tmp_path / "model"
    for seed in (0, 1):
        model = tiny_model(seed=seed)
        export_model(model, word_tokenizer(), out, backend=backend, shard_bytes=10**9)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(CheckpointError, match="free disk space"):
            export_model(
                tiny_model(),
                word_tokenizer(),
                disk / "model",
                backend=NotedBackend(),
                shard_bytes=LIMIT,
            )
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
