"""Claimed: a stored reference gives back what was written, whoever wrote it and whoever reads it,
and nothing that is damaged, half built or of another model, tokenizer, data or precision is opened;
with a key nothing that somebody else wrote, not even where every checksum fits; a model's
fingerprint and its head can be had from its files alone.

Exact: all of it; states are copied, never computed here. The judge of fingerprint and head is the
loaded model.
"""

import json
import threading
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import FAMILIES, PLAIN_TEMPLATE, TEMPLATE, tiny_model, word_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM

from safereg_dist.errors import CheckpointError, ConfigError
from safereg_dist.models.fingerprint import row_key, tokenizer_fingerprint
from safereg_dist.parallel.shards import weights_fingerprint
from safereg_dist.parallel.single import SingleBackend, single_ranks
from safereg_dist.reference.store import INDEX_FILE, ReferenceStore, StoreIdentity, read_index
from safereg_dist.reference.store_writer import (
    StoreWriter,
    begin_store,
    finish_store,
    partial_folder,
)
from safereg_dist.storage.signing import HmacKey

IDENTITY = StoreIdentity(reference="r", tokenizer="t", data=("train", "anchor"), precision="bf16")
HIDDEN = 48


def key_of(number):
    """The name of a row; every sixteenth ends in a zero byte, which numpy's texts would lose."""
    key = row_key([number, number + 1, number + 2], [0, 1, 1])
    return key[:-2] + "00" if number % 16 == 0 else key


def states_of(number, dtype=torch.bfloat16):
    """States of 1 to 37 tokens."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1 + number * 7 % 37, HIDDEN, generator=generator).to(dtype)


def build(out, numbers, *, ranks=2, dtype=torch.bfloat16, shard_bytes=20_000, key=None):
    """A store of these rows, dealt to so many writers."""
    folder, how = begin_store(out), {"shard_bytes": shard_bytes, "is_signed": key is not None}
    writers = [StoreWriter(folder, rank, **how) for rank in range(ranks)]
    for place, number in enumerate(numbers):
        writers[place % ranks].add(key_of(number), states_of(number, dtype))
    for writer in writers:
        writer.flush()
    rows = sum(len(writer) for writer in writers)
    return finish_store(out, IDENTITY, hidden_size=HIDDEN, rows=rows, key=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_comes_back_bit_for_bit(tmp_path, ranks, dtype):
    size = build(tmp_path / "store", range(101), ranks=ranks, dtype=dtype)
    store = ReferenceStore.open(tmp_path / "store", IDENTITY)
    assert len(store) == size.rows == 101
    assert store.hidden_size == HIDDEN
    assert size.tokens == sum(len(states_of(number)) for number in range(101))
    for number in reversed(range(101)):
        assert store.holds(key_of(number))
        found = store.read(key_of(number))
        assert found.dtype == dtype
        assert torch.equal(found, states_of(number, dtype))
    for stranger in (row_key([5], [0]), "00" * 32, "ff" * 32):
        assert not store.holds(stranger)
        with pytest.raises(KeyError):
            store.read(stranger)
    files = list((tmp_path / "store").iterdir())
    assert sum(f.stat().st_size for f in files) == size.num_bytes
    assert not partial_folder(tmp_path / "store").exists()


def test_shards_are_bounded_and_a_long_row_has_one_of_its_own(tmp_path):
    build(tmp_path / "store", range(60), ranks=1, shard_bytes=3_000)
    sizes = []
    for path in (tmp_path / "store").glob("*.safetensors"):
        tensors = load_file(path)
        sizes.append((tensors["hidden"].numel() * 2, len(tensors["keys"])))
    assert len(sizes) > 20
    assert all(size <= 3_000 or rows == 1 for size, rows in sizes)
    assert any(size > 3_000 for size, _ in sizes)


def test_equal_rows_are_stored_once_by_a_rank_and_found_whoever_stored_them(tmp_path):
    numbers = [3, 3, 4, 3, 5, 3]  # 3 goes to both writers: twice to the first, twice to the second
    size = build(tmp_path / "store", numbers)
    assert size.rows == 4  # 3 and 4 and 5 of the first, 3 of the second
    store = ReferenceStore.open(tmp_path / "store", IDENTITY)
    assert len(store) == 3
    assert torch.equal(store.read(key_of(3)), states_of(3))


def test_a_store_without_rows_opens(tmp_path):
    assert build(tmp_path / "store", []).rows == 0
    store = ReferenceStore.open(tmp_path / "store", IDENTITY)
    assert len(store) == 0
    assert not store.holds(key_of(0))


def test_overhead_is_an_index_of_a_few_bytes_a_row(tmp_path):
    size = build(tmp_path / "store", range(200), ranks=1, shard_bytes=1 << 20)
    # 48 bytes a row (name, begin, crc32), and headers of one shard and the index.
    assert size.num_bytes - size.tokens * HIDDEN * 2 < 200 * 48 + 1500


def test_threads_read_at_once(tmp_path):
    build(tmp_path / "store", range(40))
    store = ReferenceStore.open(tmp_path / "store", IDENTITY)
    wrong = []

    def read_all():
        for number in range(40):
            if not torch.equal(store.read(key_of(number)), states_of(number)):
                wrong.append(number)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reference", "other"),
        ("tokenizer", "other"),
        ("data", ("train",)),
        ("data", ("changed", "anchor")),
        ("precision", "fp32"),
        ("format", 0),
    ],
)
def test_states_of_something_else_are_refused_by_name(tmp_path, field, value):
    build(tmp_path / "store", range(3))
    with pytest.raises(ConfigError, match=f"another {field}: expected .*build it again"):
        ReferenceStore.open(tmp_path / "store", replace(IDENTITY, **{field: value}))


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / INDEX_FILE).write_text('{"identity": {')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / INDEX_FILE).write_text('{"weight_map": {}}')
    build(tmp_path / "edited", range(3))
    index = json.loads((tmp_path / "edited" / INDEX_FILE).read_text())
    del index["shards"][1]["sha256"]
    (tmp_path / "edited" / INDEX_FILE).write_text(json.dumps(index))
    for name in ("absent", "empty", "torn", "foreign", "edited"):
        with pytest.raises(ConfigError, match="expected a stored reference"):
            ReferenceStore.open(tmp_path / name, IDENTITY)


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def damage_header(path):
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def damage_gone(path):
    path.unlink()


def damage_table(path):
    tensors = load_file(path)
    tensors["keys"][0, 0] ^= 1
    save_file(tensors, path)


def damage_shape(path):
    tensors = load_file(path)
    tensors["hidden"] = tensors["hidden"].reshape(-1, HIDDEN // 2)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_header, damage_gone, damage_table, damage_shape]
)
def test_a_damaged_shard_is_refused_on_opening(tmp_path, damage):
    build(tmp_path / "store", range(30))
    damage(sorted((tmp_path / "store").glob("*.safetensors"))[1])
    with pytest.raises(ConfigError, match=r"rank0-00001\.safetensors.*build it again"):
        ReferenceStore.open(tmp_path / "store", IDENTITY)


def test_states_that_changed_on_the_disk_are_refused_on_reading(tmp_path):
    build(tmp_path / "store", range(8), ranks=1, shard_bytes=1 << 20)
    path = tmp_path / "store" / "rank0-00000.safetensors"
    tensors = load_file(path)
    spoilt = tensors["begin"][2]  # first token of the third row
    tensors["hidden"].view(torch.int16)[spoilt, 5] ^= 1
    save_file(tensors, path)
    store = ReferenceStore.open(tmp_path / "store", IDENTITY)
    for number in range(8):
        if number == 2:
            with pytest.raises(CheckpointError, match="not those that were written"):
                store.read(key_of(number))
        else:
            assert torch.equal(store.read(key_of(number)), states_of(number))


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("SAFEREG_TEST_KEY", "a secret of enough characters")
    return HmacKey("SAFEREG_TEST_KEY")


def open_signed(folder, key):
    return ReferenceStore.open(folder, IDENTITY, index=read_index(folder, key))


def test_a_signed_store_is_refused_where_somebody_else_wrote_its_index(tmp_path, key):
    folder = tmp_path / "store"
    size = build(folder, range(30), key=key)
    assert size.num_bytes == sum(f.stat().st_size for f in folder.iterdir())
    store = open_signed(folder, key)
    for number in range(30):
        assert torch.equal(store.read(key_of(number)), states_of(number))
    assert len(ReferenceStore.open(folder, IDENTITY)) == 30  # who has no key reads it all the same
    build(tmp_path / "forged", [*range(29), 99])
    for path in (tmp_path / "forged").iterdir():
        path.replace(folder / path.name)
    assert len(ReferenceStore.open(folder, IDENTITY)) == 30
    with pytest.raises(ConfigError, match=r"index\.json was changed or signed with another key"):
        open_signed(folder, key)
    (folder / f"{INDEX_FILE}.sig").unlink()
    with pytest.raises(ConfigError, match=r"index\.json is not signed.*build it again"):
        open_signed(folder, key)


@pytest.mark.parametrize("is_signed", [True, False])
def test_states_with_the_checksum_of_others_are_refused_in_a_signed_store(tmp_path, key, is_signed):
    """A CRC-32 finds damage alone, which is what an unsigned store promises."""
    used = key if is_signed else None
    build(tmp_path / "store", [3], ranks=1, key=used)
    path = tmp_path / "store" / "rank0-00000.safetensors"
    tensors = load_file(path)
    hidden = tensors["hidden"].view(torch.uint8)
    content = hidden.numpy().tobytes()
    forged = with_the_crc_of(content)
    assert forged != content
    hidden.view(-1)[:] = torch.frombuffer(bytearray(forged), dtype=torch.uint8)
    save_file(tensors, path)
    store = open_signed(tmp_path / "store", used)
    if is_signed:
        with pytest.raises(CheckpointError, match="not those that were written"):
            store.read(key_of(3))
    else:
        assert not torch.equal(store.read(key_of(3)), states_of(3))


def with_the_crc_of(content):
    """Other bytes with the CRC-32 of these: the first dependent set of changes by one bit.

    A change of bits changes the sum by an XOR that hangs on their places alone, so that among 33
    places some cancel each other (elimination over GF(2)).
    """

    def flipped(bits):
        found = bytearray(content)
        for bit in bits:
            found[bit // 8] ^= 1 << bit % 8
        return bytes(found)

    basis = {}  # leading bit of a sum -> (the sum, the places)
    for bit in range(33):
        change, places = zlib.crc32(flipped([bit])) ^ zlib.crc32(content), {bit}
        while change and change.bit_length() in basis:
            other, others = basis[change.bit_length()]
            change, places = change ^ other, places ^ others
        if not change:
            return flipped(places)
        basis[change.bit_length()] = change, places
    raise AssertionError("33 vectors of 32 bits are dependent")


def test_no_random_flip_of_a_signed_store_is_read(tmp_path, key):
    build(tmp_path / "store", range(20), key=key)
    files = sorted((tmp_path / "store").iterdir())
    draw, refused = np.random.default_rng(0), 0
    for number in range(300):
        path = files[number % len(files)]
        content = bytearray(path.read_bytes())
        kept = bytes(content)
        content[draw.integers(len(content))] ^= 1 << draw.integers(8)
        path.write_bytes(content)
        try:
            store = open_signed(tmp_path / "store", key)
            rows = [store.read(key_of(row)) for row in range(20)]
            # A flip may hit the spaces of a shard's header, which mean nothing.
            assert all(torch.equal(rows[row], states_of(row)) for row in range(20)), path
        except (ConfigError, CheckpointError, KeyError):
            refused += 1
        path.write_bytes(kept)
    assert refused > 290


def test_a_build_that_ends_early_leaves_nothing_that_opens_and_is_begun_again(tmp_path):
    out = tmp_path / "store"
    writer = StoreWriter(begin_store(out), 0)
    writer.add(key_of(1), states_of(1))
    writer.flush()
    for folder in (out, partial_folder(out)):
        with pytest.raises(ConfigError, match="expected a stored reference"):
            ReferenceStore.open(folder, IDENTITY)
    build(out, [2])
    store = ReferenceStore.open(out, IDENTITY)
    assert store.holds(key_of(2))
    assert not store.holds(key_of(1)), "a shard of the build before was taken over"


def test_a_finished_store_is_not_overwritten(tmp_path):
    build(tmp_path / "store", [1])
    with pytest.raises(ConfigError, match="exists"):
        begin_store(tmp_path / "store")
    assert len(ReferenceStore.open(tmp_path / "store", IDENTITY)) == 1


def test_shards_that_another_node_wrote_elsewhere_are_missed(tmp_path):
    writer = StoreWriter(begin_store(tmp_path / "store"), 0)
    writer.add(key_of(1), states_of(1))
    writer.flush()
    with pytest.raises(ConfigError, match=r"2 rows, .* shows those of 1.*all nodes see"):
        finish_store(tmp_path / "store", IDENTITY, hidden_size=HIDDEN, rows=2)
    assert not (tmp_path / "store").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected to write stored states"):
        begin_store(tmp_path / "file" / "store")
    writer = StoreWriter(tmp_path / "absent", 0)
    writer.add(key_of(1), states_of(1))
    with pytest.raises(CheckpointError, match="expected to write stored states"):
        writer.flush()


def models():
    """Models of several families; Falcon, Gemma 2 and one Llama share head and embedding."""
    for family in FAMILIES:
        yield family, tiny_model(family, vocab=97)
    yield "llama tied", tiny_model("llama", tie_word_embeddings=True)
    yield "llama bf16", tiny_model("llama").bfloat16()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    gemma = Gemma2Config(vocab_size=97, num_key_value_heads=2, intermediate_size=48, **sizes)
    yield "gemma", Gemma2ForCausalLM(gemma)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_fingerprint_and_head_from_the_files_are_the_models(tmp_path, precision):
    backend = SingleBackend(single_ranks())
    for name, model in models():
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        loaded = backend.load_model(tmp_path / name, precision=precision, offload="none")
        found = weights_fingerprint(tmp_path / name, backend.ranks)
        assert found == backend.fingerprint(loaded), name
        head = backend.load_head(tmp_path / name, precision=precision)
        weight = loaded.get_output_embeddings().weight
        assert head.weight is not None
        assert head.weight.dtype == weight.dtype
        assert torch.equal(head.weight, weight), name
        assert not head.weight.requires_grad
        assert head.bias is None
        assert head.softcap == (30.0 if name == "gemma" else None)


def test_a_head_bias_is_read_and_a_changed_weight_changes_the_fingerprint(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
    model = PhiForCausalLM(PhiConfig(num_attention_heads=4, intermediate_size=48, **sizes))
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    backend = SingleBackend(single_ranks())
    head = backend.load_head(tmp_path, precision="fp32")
    assert head.bias is not None
    assert torch.equal(head.bias, model.lm_head.bias)
    before = weights_fingerprint(tmp_path, backend.ranks)
    with torch.no_grad():
        model.lm_head.bias[96] += 1
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(tmp_path, backend.ranks) != before


def test_a_folder_without_all_weights_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    backend = SingleBackend(single_ranks())
    lost = {name: t for name, t in tensors.items() if name != "model.norm.weight"}
    save_file(lost, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no tensor for 1 parameters"):
        weights_fingerprint(tmp_path, backend.ranks)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"'lm_head\.weight' has shape"):
        backend.load_head(tmp_path, precision="fp32")


def test_tokenizer_fingerprint_knows_the_template_and_forgets_how_it_was_called(tmp_path):
    tokenizer = word_tokenizer(TEMPLATE)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(word_tokenizer(PLAIN_TEMPLATE)) != before
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == before
    tokenizer.add_tokens(["w90"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_the_index_is_plain(tmp_path):
    """What a person, or another program, finds in it."""
    build(tmp_path / "store", range(3))
    index = json.loads((tmp_path / "store" / INDEX_FILE).read_text())
    assert index["identity"]["data"] == ["train", "anchor"]
    assert index["hidden_size"] == HIDDEN
    assert [shard["file"] for shard in index["shards"]] == [
        "rank0-00000.safetensors",
        "rank1-00000.safetensors",
    ]
