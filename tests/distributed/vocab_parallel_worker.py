"""One tensor-parallel rank of test_vocab_parallel: every case against the float64 oracle."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "tests"))

import head_oracle as oracles
import numpy as np
import quick_interpreter
import torch
from torch import distributed as dist

from safereg_kernels import (
    fused,
    linear_ce_kl,
    vocab_parallel_linear_ce_kl,
    vocab_parallel_masked_kl,
)

TOKENS, VOCAB, HIDDEN = 11, 301, 8
SHARDS = {
    2: [(200, 101), (301, 0), (0, 301), (1, 300)],
    3: [(100, 101, 100), (150, 0, 151), (0, 0, 301)],
}
ALL = os.environ.get("SAFEREG_TESTS") == "full"
"""Else Triton's path, which is interpreted, takes two directions on three ranks."""
FEW_OF_THREE = ("forward", "jsd")
fused.BLOCK_COLUMNS = 64
quick_interpreter.install()


class Collectives:
    """Counts what crosses ranks, and how many bytes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        for name in ("all_gather_into_tensor", "all_reduce"):
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name, function):
        def counted(*tensors, **options):
            self.calls.append((name, tensors[-1].numel() * tensors[-1].element_size()))
            return function(*tensors, **options)

        return counted

    def taken(self) -> list[tuple[str, int]]:
        calls, self.calls = self.calls, []
        return calls


def close(got, want, relative=4e-5):
    want = np.asarray(want)
    scale = np.abs(want).max(initial=0.0)
    got = got.detach().double().numpy()
    np.testing.assert_allclose(got, want, rtol=relative, atol=relative * 0.1 * scale + 1e-9)


def truth(tensor):
    return tensor.detach().double().numpy()


def inputs_of(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(2, TOKENS, generator=generator) + 0.1
    weights[0, ::3] = 0.0
    weights[1, 1::3] = 0.0
    weights[:, 5] = 0.0
    hidden, reference = torch.randn(2, TOKENS, HIDDEN, generator=generator)
    head, reference_head = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    return {
        "policy_hidden": hidden,
        "policy_head": head,
        "labels": torch.randint(0, 290, (TOKENS,), generator=generator),
        "ce_weights": weights[0],
        "kl_weights": weights[1],
        "reference_hidden": reference,
        "reference_head": reference_head,
    }


def check_masked_kl(columns, start, direction, vocab_size, temperature, collectives):
    inputs = inputs_of(0)
    x = inputs["policy_hidden"] @ inputs["policy_head"].T
    y = inputs["reference_hidden"] @ inputs["reference_head"].T
    weights = inputs["kl_weights"]
    shard = slice(start, start + columns)
    mine = x[:, shard].contiguous().requires_grad_()
    loss, div = vocab_parallel_masked_kl(
        mine,
        y[:, shard].contiguous(),
        weights,
        tp_group=dist.group.WORLD,
        vocab_start=start,
        direction=direction,
        temperature=temperature,
        vocab_size=vocab_size,
    )
    shares = [("all_reduce", TOKENS * 2 * 4)] if direction == "jsd" else []
    assert collectives.taken() == [("all_gather_into_tensor", TOKENS * 9 * 4), *shares]
    (loss * 3).backward()
    assert collectives.taken() == []
    x, y, w = truth(x)[:, :vocab_size], truth(y)[:, :vocab_size], truth(weights)
    want = np.where(w != 0, oracles.divergence(x, y, direction, temperature), 0.0)
    grad = np.zeros((TOKENS, VOCAB))
    grad[:, :vocab_size] = oracles.divergence_grad(x, y, direction, temperature) * w[:, None]
    close(div, want)
    close(loss, w @ want)
    close(mine.grad, 3 * grad[:, shard])


def check_linear(columns, start, direction, vocab_size, softcap, reduce, collectives):
    inputs = inputs_of(1)
    shard = slice(start, start + columns)
    hidden = inputs["policy_hidden"].requires_grad_()
    head = inputs["policy_head"][shard].clone().requires_grad_()
    given = {**inputs, "policy_head": head, "reference_head": inputs["reference_head"][shard]}
    loss, ce, div = vocab_parallel_linear_ce_kl(
        **given,
        tp_group=dist.group.WORLD,
        vocab_start=start,
        direction=direction,
        chunk_tokens=4,
        vocab_size=vocab_size,
        policy_softcap=softcap,
        reference_softcap=softcap,
        reduce_hidden_grad=reduce,
    )
    active = int(((inputs["ce_weights"] != 0) | (inputs["kl_weights"] != 0)).sum())
    num_kl = int((inputs["kl_weights"] != 0).sum())
    chunks = []
    for at in range(0, active, 4):
        rows = min(4, active - at)
        chunks.append(("all_gather_into_tensor", rows * 9 * 4))
        if direction == "jsd" and at < num_kl:  # rows with a divergence come first
            chunks.append(("all_reduce", rows * 2 * 4))
    summed = [("all_reduce", TOKENS * HIDDEN * 4)] if reduce else []
    assert collectives.taken() == chunks + summed
    (loss * 3).backward()
    assert collectives.taken() == []
    arrays = {name: truth(t) if name != "labels" else t.numpy() for name, t in inputs.items()}
    want = oracles.linear_ce_kl(
        arrays.pop("policy_hidden"),
        arrays.pop("policy_head"),
        arrays.pop("labels"),
        **arrays,
        direction=direction,
        softcap=softcap,
        reference_softcap=softcap,
        vocab_size=vocab_size,
    )
    close(loss, want.loss)
    close(ce, want.ce)
    close(div, want.divergence)
    close(head.grad, 3 * want.grad_head[shard])
    if not reduce:
        dist.all_reduce(hidden.grad)
        collectives.taken()
    close(hidden.grad, 3 * want.grad_hidden)


def check_ranks_agree_to_the_bit(columns, start):
    inputs = inputs_of(2)
    shard = slice(start, start + columns)
    given = {
        **inputs,
        "policy_head": inputs["policy_head"][shard],
        "reference_head": inputs["reference_head"][shard],
    }
    results = vocab_parallel_linear_ce_kl(
        **given, tp_group=dist.group.WORLD, vocab_start=start, chunk_tokens=4
    )
    whole = linear_ce_kl(**inputs, chunk_tokens=4)
    for mine, unsharded in zip(results, whole, strict=True):
        others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(others, mine)
        assert all(torch.equal(mine, other) for other in others)
        close(mine, truth(unsharded), relative=1e-5)


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    collectives = Collectives()
    count = 0
    cases = [("eager", shards) for shards in SHARDS[size]]
    cases += [("triton", shards) for shards in SHARDS[size][-1:]]  # the interpreter is slow
    for path, shards in cases:
        os.environ["SAFEREG_KERNELS"] = path
        columns, start = shards[rank], sum(shards[:rank])
        is_short = path == "triton" and size == 3 and not ALL
        for direction in FEW_OF_THREE if is_short else oracles.DIRECTIONS:
            for vocab_size, temperature in ((None, 1.0), (290, 0.7)):
                check_masked_kl(columns, start, direction, vocab_size, temperature, collectives)
                count += 1
            for vocab_size, softcap, reduce in ((None, None, True), (290, 4.0, False)):
                check_linear(columns, start, direction, vocab_size, softcap, reduce, collectives)
                count += 1
        check_ranks_agree_to_the_bit(columns, start)
        collectives.taken()
    if rank == 0:
        print(f"{count} cases hold")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
