"""The rank of `bench_zero3.py`, started by torchrun: zero3_worker.py DEVICE OUT.csv FOLDER

The path that users take, on the smallest scale: a small random Llama and a reference on disk, rows
with a risk column, `build_run`, one optimizer step; once on the single-process engine, then under
DeepSpeed, the reference's shards on the device or in host memory. Compared are the loss, every
gradient, and every weight after the update.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from bench_zero3 import CASES, case_columns, rows_of
from problems import relative_gap
from result_rows import Rows
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from safereg_dist.config import (
    Config,
    DataConfig,
    EngineConfig,
    ReferenceConfig,
    RegularizerConfig,
    RiskConfig,
    TrainConfig,
)
from safereg_dist.demo.tokenizer import SPECIAL_TOKENS, build_tokenizer
from safereg_dist.factory import Run, build_run, start_backend
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.engine import PolicyEngine, Update
from safereg_dist.parallel.single import SingleBackend
from safereg_dist.trainer import optimizer_step

WITHIN = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest gap of a loss, a gradient or an updated weight: kernels round alike, sums are taken in
another order, and a bfloat16 gradient has 8 bits."""
ROWS, WORDS, HIDDEN = 4, 12, 128
_LR = 1e-3


class Outcome(NamedTuple):
    """One optimizer step."""

    loss: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    """After the update."""
    reference_rows: int


def write_folder(folder: Path) -> None:
    """Policy, reference, tokenizer and rows, every other row risky."""
    tokenizer = build_tokenizer()
    for seed, part in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        shape = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.1,
        )
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder / part)
        tokenizer.save_pretrained(folder / part)
    words = [w for w in sorted(tokenizer.get_vocab()) if w not in SPECIAL_TOKENS and w.isalpha()]
    draw = torch.Generator().manual_seed(0)
    lines = []
    for i in range(ROWS):
        drawn = [words[n] for n in torch.randint(len(words), (2 * WORDS,), generator=draw).tolist()]
        prompt, response = " ".join(drawn[:WORDS]), " ".join(drawn[WORDS:])
        lines.append({"id": str(i), "prompt": prompt, "response": response, "risk": i % 2})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def config_of(folder: Path, engine: str, precision: str, offload: str) -> Config:
    """The configuration of one case."""
    return Config(
        model=str(folder / "policy"),
        data=DataConfig(train=str(folder / "rows.jsonl")),
        reference=ReferenceConfig(model=str(folder / "reference"), offload=offload),
        risk=RiskConfig(estimator="column"),
        regularizer=RegularizerConfig(ceiling=0.7),
        train=TrainConfig(micro_batch_size=ROWS // 2, grad_accum_steps=2, precision=precision),
        engine=EngineConfig(name=engine),
        output_dir=str(folder / "run"),
    )


class WatchedEngine:
    """A `PolicyEngine` that calls `look` before each update, while gradients are still there."""

    def __init__(self, engine: PolicyEngine, look: Callable[[], None]) -> None:
        self._engine = engine
        self._look = look
        self.backward, self.save, self.load = engine.backward, engine.save, engine.load

    def __call__(self, input_ids: Tensor, **positions: Tensor) -> Tensor:
        """What the engine gives."""
        return self._engine(input_ids, **positions)

    def update(self, lr: float) -> Update:
        """The engine's update, after a look."""
        self._look()
        return self._engine.update(lr)


def one_step(run: Run, gradient_of: Callable[[Run, str, Tensor], Tensor]) -> Outcome:
    """An optimizer step as `train` makes it, on the first rows of the stream."""
    parameters = dict(run.model.named_parameters())
    gradients: dict[str, Tensor] = {}

    def look() -> None:
        for name, parameter in parameters.items():
            gradients[name] = gradient_of(run, name, parameter).cpu()

    watched = replace(run, engine=WatchedEngine(run.engine, look))
    sums = optimizer_step(watched, run.sources.rows_of_step(0), step=0, lr=_LR).totals.sums
    with run.backend.gathered(parameters.values()):
        weights = {name: p.detach().float().cpu() for name, p in parameters.items()}
    return Outcome(
        torch.tensor(sums["loss"]), gradients, weights, reference_rows=int(sums["reference_rows"])
    )


def _single_gradient(run: Run, name: str, parameter: Tensor) -> Tensor:
    engine = run.engine
    for master, trained in zip(engine._masters, engine._trained, strict=True):
        if trained is parameter:
            return master.grad.clone()
    raise AssertionError(name)


def _sharded_gradient(run: Run, name: str, parameter: Tensor) -> Tensor:
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter).float()


def single_outcomes(folder: Path, device: torch.device) -> dict[str, Outcome]:
    """By precision, on the single-process engine."""
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=device, dp_group=None)
    return {
        precision: one_step(
            build_run(config_of(folder, "single", precision, "none"), SingleBackend(ranks)),
            _single_gradient,
        )
        for precision in dict(CASES)
    }


def gap_of(found: Outcome, expected: Outcome) -> float:
    """The largest gap of the loss, a gradient or a weight; nan where one is not finite."""
    gaps = [relative_gap(found.loss, expected.loss)]
    for name, gradient in expected.gradients.items():
        gaps.append(relative_gap(found.gradients[name], gradient))
        gaps.append(relative_gap(found.weights[name], expected.weights[name]))
    return float(torch.tensor(gaps).max())


def work(folder: Path, device: torch.device, rows: Rows) -> bool:
    """All cases; True where each agrees with the single-process engine."""
    write_folder(folder)
    expected = single_outcomes(folder, device)
    backend = start_backend(config_of(folder, "deepspeed", "fp32", "none"))
    is_good = True
    for precision, offload in CASES:
        run = build_run(config_of(folder, "deepspeed", precision, offload), backend)
        found = one_step(run, _sharded_gradient)
        gap = gap_of(found, expected[precision])
        is_within = gap <= WITHIN[precision]
        is_good &= is_within
        rows.add(
            **case_columns(precision, offload),
            status="ok" if is_within else f"differs by {gap:.2g}",
            loss=float(found.loss),
            gap=gap,
            gap_limit=WITHIN[precision],
            count=found.reference_rows,
            N=ROWS,
            H=HIDDEN,
        )
        run.engine.engine.destroy()
    return is_good


def main() -> None:
    """All cases; the exit status."""
    device, out, folder = sys.argv[1:]
    is_good = work(Path(folder), torch.device(device), rows_of(device, Path(out)))
    sys.stdout.flush()
    os._exit(0 if is_good else 1)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
