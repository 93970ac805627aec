"""One ZeRO-3 step of policy and reference against the same step of the single-process engine.

    python benchmarks/bench_zero3.py --device cuda|cpu --out FILE.csv

The path that users take, on the smallest scale: a small random Llama and a reference on disk, rows
with a risk column, `build_run`, one optimizer step; once on the single-process engine, then under
DeepSpeed, started by torchrun with one rank (NCCL on CUDA, gloo on a CPU), the reference's shards
on the device or in host memory. Compared are the loss, every gradient, and every weight after the
update; a row for each case says how far they are apart, or why it could not run.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from harness import provenance
from problems import relative_gap
from result_rows import Rows, read_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from safereg_dist.batch import collate_window
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
from safereg_dist.parallel.single import SingleBackend

CASES = (("fp32", "none"), ("bf16", "none"), ("bf16", "cpu"))
"""Precision, and where the reference's shards rest."""
WITHIN = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest gap of a loss, a gradient or an updated weight: kernels round alike, sums are taken in
another order, and a bfloat16 gradient has 8 bits."""
ROWS, WORDS = 4, 12
_LR = 1e-3
_TIMEOUT_S = {"cuda": 50, "cpu": 150}


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
            hidden_size=128,
            intermediate_size=256,
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


def one_step(run: Run, gradient_of: Callable[[Run, str, Tensor], Tensor]) -> Outcome:
    """An optimizer step as `train` makes it, on the first rows of the stream."""
    count, device = run.config.train.grad_accum_steps, run.ranks.device
    window = collate_window(
        run.sources.stream, start=0, count=run.sources.rows_per_step, pad_id=run.pad_id
    ).to(device)
    num_tokens = torch.tensor(float(window.num_response_tokens), device=device)
    losses, reference_rows = [], 0
    for index, (batch, ahead) in enumerate(run.step.micro_batches(window, count)):
        output = run.engine(batch, num_tokens, ahead)
        run.engine.backward(output.loss, is_last=index == count - 1)
        losses.append(output.loss.detach())
        reference_rows += output.reference_rows
    parameters = dict(run.model.named_parameters())
    gradients = {name: gradient_of(run, name, p).cpu() for name, p in parameters.items()}
    run.engine.update(_LR)
    with run.backend.gathered(parameters.values()):
        weights = {name: p.detach().float().cpu() for name, p in parameters.items()}
    return Outcome(torch.stack(losses).sum().cpu(), gradients, weights, reference_rows)


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


def work(folder: Path, rows: Rows) -> bool:
    """What the rank does: all cases; True where each agrees with the single-process engine."""
    device = torch.device("cuda" if os.environ["BENCH_DEVICE"] == "cuda" else "cpu")
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
        )
        run.engine.engine.destroy()
    return is_good


def case_columns(precision: str, offload: str) -> dict[str, str]:
    """What identifies a case in the table."""
    return {
        "what": f"ZeRO-3 step, reference on {'the device' if offload == 'none' else offload}",
        "implementation": "DeepSpeed, 1 rank",
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[precision],
    }


@dataclass(frozen=True, slots=True)
class Ended:
    """How the rank ended."""

    code: int
    last_words: str


def launch(folder: Path, device: str, out: Path) -> Ended:
    """Runs the rank under torchrun; what it prints goes to the screen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--nnodes=1"),
        *("--local-addr=127.0.0.1", "--master-addr=127.0.0.1", f"--master-port={port}"),
        *(__file__, "--device", device, "--out", str(out), "--folder", str(folder)),
    ]
    # Loopback is all that one rank needs, and all that a machine without a network has.
    local = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**local, **os.environ, "BENCH_DEVICE": device, "DS_SKIP_CUDA_CHECK": "1"}
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    rank = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = rank.communicate(timeout=_TIMEOUT_S[device])[1]
    except subprocess.TimeoutExpired:
        rank.terminate()  # which torchrun hands on to the rank
        said = rank.communicate(timeout=8)[1]
        return Ended(124, f"not done after {_TIMEOUT_S[device]} s; {_reason(said)}")
    sys.stderr.write(said)
    return Ended(rank.returncode, _reason(said))


def _reason(text: str) -> str:
    """The last error in what a process said: torchrun adds a report of its own after it."""
    errors = [line.strip() for line in text.splitlines() if _is_error(line)]
    return errors[-1][-200:] if errors else text.strip()[-200:]


def _is_error(line: str) -> bool:
    words = line.split("]: ")[-1].split(":")[0].split()
    return len(words) == 1 and words[0].endswith(("Error", "Exception", "Unavailable"))


def _missing(written: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    known = {(row["what"], row["dtype"]) for row in written}
    for case in CASES:
        columns = case_columns(*case)
        if (columns["what"], columns["dtype"]) not in known:
            yield case


def main() -> int:
    """Starts the rank and adds what it could not; or is the rank; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="CSV to which rows are added")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = Rows(
        arguments.out, **provenance(torch.device(arguments.device)), stage="zero3", N=ROWS, H=128
    )
    if arguments.folder is not None:
        is_good = work(arguments.folder, rows)
        sys.stdout.flush()
        os._exit(0 if is_good else 1)  # as `safereg_dist.cli.entry` does
    before = len(read_rows(arguments.out))
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        ended = launch(Path(folder), arguments.device, arguments.out)
    for case in _missing(read_rows(arguments.out)[before:]):
        rows.add(**case_columns(*case), status=f"could not run: {ended.last_words}")
    return ended.code


if __name__ == "__main__":
    sys.exit(main())
