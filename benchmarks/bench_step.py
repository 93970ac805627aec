"""One optimizer step of a random Llama-3.2-1B in bfloat16, end to end, with and without reference.

    python benchmarks/bench_step.py --device cuda|cpu --out FILE.csv

`trainer.optimizer_step` on the project's own single-process engine, built directly, since there is
no data and no folder; the log is left out. 10 rows of 832 tokens, all of them response; a row is
risky or not by the risk column, and then weighs its divergence alone:

    SFT         objective `none`
    adaptive    the reference runs on the risky rows: 0, 10 and 100 % of them
    stored      the same rows' reference states are read from a store on disk
    always on   full logits of both models for every row, as other trainers do (`always_on`)

All arms share one policy, one optimizer and one reference, so they can take turns; the learning
rate is 0, and losses of all steps can be compared. Memory of an arm is that of what it needs
between steps (weights, float32 master weights and moments; the reference or its head) and of what
its step adds. FLOPs are those of matrix products, attention over the causal half, no
recomputation counted; their share of the matmul rate is the model-FLOP utilisation.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from always_on import AlwaysOn, WholeModel
from harness import Measurement, matmul_limit, measure_interleaved, provenance
from peers import status_of
from result_rows import Rows
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from safereg_dist.coefficient import DEFAULT_THRESHOLD, Coefficient
from safereg_dist.config import (
    Config,
    DataConfig,
    EngineConfig,
    RegularizerConfig,
    RiskConfig,
    TrainConfig,
)
from safereg_dist.factory import Run
from safereg_dist.models.fingerprint import row_key
from safereg_dist.objective import Objective
from safereg_dist.parallel.comm import Ranks
from safereg_dist.parallel.single import SingleBackend
from safereg_dist.policy import Policy
from safereg_dist.reference import EngineModel, NoReference, Packing, Reference
from safereg_dist.reference.store import ReferenceStore, map_shard
from safereg_dist.reference.store_writer import StoreWriter
from safereg_dist.risk.stage import ColumnRisk, RiskSource, RiskStage, WeightedSource
from safereg_dist.step import SafetyRegularizer
from safereg_dist.trainer import optimizer_step
from safereg_dist.types import Row, head_of
from safereg_kernels import linear_ce_kl_flops

SFT, ADAPTIVE, STORED, ALWAYS_ON = "SFT", "adaptive", "stored", "always on"
ROUNDS = {"cuda": 15, "cpu": 3}
SAME_LOSS = {"bf16": 2e-2, "fp32": 1e-5}
"""Relative difference up to which two arms have the same loss: they round alike, in another order;
full logits are rounded to bfloat16."""
_LIMIT = "limit of the machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Model and rows of one run."""

    model: LlamaConfig
    length: int
    """Tokens of a row."""
    precision: str
    rows: int = 10


def _llama(hidden: int, layers: int, heads: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


SIZES = {
    "cuda": Sizes(model=_llama(2048, 16, 32, 128256), length=832, precision="bf16"),
    "cpu": Sizes(model=_llama(128, 2, 4, 2048), length=32, precision="fp32"),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arm:
    """One way to train on some rows."""

    name: str
    risky: int
    """Rows with a divergence."""
    run: Run
    rows: list[Row]
    flops: int
    resident_bytes: int
    """What is held between steps."""


class Bench:
    """The arms, over one policy, one optimizer and one reference."""

    def __init__(self, sizes: Sizes, device: torch.device, folder: Path) -> None:
        self.sizes, self.device = sizes, device
        ranks = Ranks(rank=0, world_size=1, local_rank=0, device=device, dp_group=None)
        self._ranks, self._backend = ranks, SingleBackend(ranks)
        self.policy, self._reference = (random_model(sizes, device, seed) for seed in (0, 1))
        self._policy = Policy(self.policy)
        self._config = self._config_of("convex")
        packing = Packing(rows_per_pass=sizes.rows, max_length=sizes.length)
        model = EngineModel.of_model(
            self._reference, backend=self._backend, offload="none", rows=sizes.rows
        )
        self._running = Reference(model, ranks=ranks, packing=packing)
        self._stored = self._store(folder, packing)
        whole = self._backend.wrap_reference(
            WholeModel(self._reference), offload="none", rows=sizes.rows
        )
        self._engine = self._backend.wrap_policy(self.policy.train(), config=self._config)
        plain = self._regularizer("none", NoReference())
        self._runs = {
            SFT: self._run(plain),
            ADAPTIVE: self._run(self._regularizer("convex", self._running)),
            STORED: self._run(self._regularizer("convex", self._stored)),
            ALWAYS_ON: self._run(AlwaysOn(plain, whole, self._config.regularizer)),
        }

    def arms(self) -> Iterator[Arm]:
        """In the order in which they are reported."""
        rows = self.sizes.rows
        yield self._arm(SFT, 0)
        for risky in (0, rows // 10, rows):
            yield self._arm(ADAPTIVE, risky)
        for risky in (rows // 10, rows):
            yield self._arm(STORED, risky)
        yield self._arm(ALWAYS_ON, rows)

    def run(self, arm: Arm) -> dict[str, float]:
        """One optimizer step; its sums."""
        return optimizer_step(arm.run, arm.rows, step=0, lr=0.0).totals.sums

    def forget(self) -> None:
        """Drops what a step that failed on its way has left."""
        self.policy.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _arm(self, name: str, risky: int) -> Arm:
        rows = [replace(row, risk=float(i < risky)) for i, row in enumerate(self._rows())]
        trained = sum(p.numel() * (p.element_size() + 12) for p in self.policy.parameters())
        held = {
            SFT: [],
            STORED: head_of(self._reference).parameters,
        }.get(name, list(self._reference.parameters()))
        return Arm(
            name=name,
            risky=risky,
            run=self._runs[name],
            rows=rows,
            flops=step_flops(self.policy, name, risky=risky, sizes=self.sizes),
            resident_bytes=trained + sum(p.nbytes for p in held),
        )

    def _rows(self) -> list[Row]:
        draw = torch.Generator().manual_seed(0)
        shape = (self.sizes.rows, self.sizes.length)
        ids = torch.randint(self.sizes.model.vocab_size, shape, generator=draw).tolist()
        mask = [0, *[1] * (self.sizes.length - 1)]  # nothing predicts the first token
        return [
            Row(
                id=str(i),
                input_ids=row,
                loss_mask=mask,
                prompt_ends=[1],
                risk=0.0,
                prompt_key=str(i),
            )
            for i, row in enumerate(ids)
        ]

    def _config_of(self, objective: str) -> Config:
        return Config(
            model="random",
            data=DataConfig(train="random", max_length=self.sizes.length),
            risk=RiskConfig(estimator="none" if objective == "none" else "column"),
            regularizer=RegularizerConfig(objective=objective),
            train=TrainConfig(micro_batch_size=self.sizes.rows, precision=self.sizes.precision),
            engine=EngineConfig(name="single"),
        )

    def _run(self, regularizer: SafetyRegularizer | AlwaysOn) -> Run:
        absent: Any = None  # nothing of a run that a step does not read
        sources: Any = SimpleNamespace(micro_batches=1)
        theirs: Any = regularizer
        return Run(
            config=self._config,
            ranks=self._ranks,
            backend=self._backend,
            tokenizer=absent,
            sources=sources,
            model=self.policy,
            regularizer=theirs,
            engine=self._engine,
            pad_id=0,
            fingerprints={},
        )

    def _regularizer(self, objective: str, reference: Reference | NoReference) -> SafetyRegularizer:
        config = self._config_of(objective)
        source = RiskSource() if objective == "none" else ColumnRisk()
        return SafetyRegularizer(
            self._policy,
            risk=RiskStage([WeightedSource("", source, DEFAULT_THRESHOLD)]),
            coefficient=Coefficient(config.regularizer, threshold=None, ranks=self._ranks),
            reference=reference,
            objective=Objective(
                config.regularizer,
                chunk_tokens=config.train.chunk_tokens,
                head_bytes=config.train.head_bytes,
            ),
            ranks=self._ranks,
        )

    def _store(self, folder: Path, packing: Packing) -> Reference:
        """The reference's states of all rows, on disk, and its head."""
        writer, rows = StoreWriter(folder, rank=0), self._rows()
        states = self._running.response_states(rows, passes=1)
        for row, hidden in zip(rows, states, strict=True):
            writer.add(row_key(row.input_ids, row.loss_mask), hidden.cpu())
        writer.flush()
        shards = [map_shard(path) for path in sorted(folder.glob("rank*.safetensors"))]
        return Reference(
            EngineModel(head_of(self._reference), _no_trunk, backend=self._backend),
            ranks=self._ranks,
            packing=packing,
            store=ReferenceStore(shards, self._running.state_size),
        )


def _no_trunk() -> Any:
    raise AssertionError("all rows are stored: the trunk is never run")


def random_model(sizes: Sizes, device: torch.device, seed: int) -> PreTrainedModel:
    """A model of random weights, made on the device."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if sizes.precision == "bf16" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(
            sizes.model, dtype=dtype, attn_implementation="sdpa"
        )
    return model.to(device)


def step_flops(model: PreTrainedModel, name: str, *, risky: int, sizes: Sizes) -> int:
    """FLOPs of one step's matrix products, 2 a multiply-add.

    trunk = rows (2 W S + 2 S^2 A L), its backward twice that; a head's products are 2 T V H each.
    W weights of the layers' products, S tokens of a row, A width of the queries, L layers.
    """
    config, rows, length = sizes.model, sizes.rows, sizes.length
    weights = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear))
    width = config.num_attention_heads * config.head_dim
    scores = 2 * length**2 * width * config.num_hidden_layers
    row = 2 * weights * length + scores
    tokens = length if name == ALWAYS_ON else length - 1
    head = linear_ce_kl_flops(
        num_active=rows * tokens,
        num_kl=risky * tokens,
        columns=config.vocab_size,
        hidden_size=config.hidden_size,
        reference_hidden_size=config.hidden_size,
    )
    runs_on = 0 if name == STORED else risky
    return (3 * rows + runs_on) * row + head.total


def measure(bench: Bench, rows: Rows) -> bool:
    """Adds a row for each arm; True where losses that should agree do."""
    sft, *others, always_on = bench.arms()
    outcomes: dict[Arm, dict[str, float]] = {}
    _take_turns(bench, [sft, *others], rows, outcomes)
    # Apart, and next to SFT once more: it may leave no memory for anything else.
    again = replace(sft, name=f"{SFT} again")
    _take_turns(bench, [again, always_on], rows, outcomes)
    return _losses_agree(outcomes, bench.sizes)


def _take_turns(
    bench: Bench, arms: list[Arm], rows: Rows, outcomes: dict[Arm, dict[str, float]]
) -> None:
    """Adds a row for each arm, its time next to that of the first one."""
    calls: dict[Arm, Callable[[], Any]] = {}
    for arm in arms:
        try:
            outcomes[arm] = bench.run(arm)
            calls[arm] = partial(bench.run, arm)
        except Exception as error:
            if arm is arms[0]:
                raise
            bench.forget()
            rows.add(status=status_of(error), **columns_of(arm, bench.sizes))
    limit = matmul_limit(bench.device)
    named = {str(i): call for i, call in enumerate(calls.values())}
    measured = measure_interleaved(
        {**named, _LIMIT: limit.call},
        bench.device,
        rounds=ROUNDS[bench.device.type],
        is_queued=False,
    )
    rate = limit.work / measured[_LIMIT].median_ms
    for name, arm in zip(named, calls, strict=True):
        rows.add(
            status="ok",
            **columns_of(arm, bench.sizes),
            **asdict(measured[name]),
            **_shares(arm, measured[name], rate, measured["0"].median_ms),
            loss=outcomes[arm]["loss"],
            count=int(outcomes[arm]["reference_rows"]),
        )


def columns_of(arm: Arm, sizes: Sizes) -> dict[str, Any]:
    """What identifies an arm in the table."""
    return {
        "what": "training step",
        "implementation": arm.name,
        "active_fraction": arm.risky / sizes.rows,
        "flops": arm.flops,
    }


def _shares(arm: Arm, measurement: Measurement, rate: float, sft: float) -> dict[str, float]:
    floor = arm.flops / rate
    return {
        "floor_ms": floor,
        "percent_of_matmul_rate": 100 * floor / measurement.median_ms,
        "matmul_flops_per_s": rate * 1e3,
        "ratio_to_sft": measurement.median_ms / sft,
        "peak_memory_bytes": arm.resident_bytes + measurement.peak_extra_bytes,
    }


def _losses_agree(outcomes: dict[Arm, dict[str, float]], sizes: Sizes) -> bool:
    """Nothing risky is SFT; stored states and full logits change nothing."""
    losses = {(arm.name, arm.risky): sums["loss"] for arm, sums in outcomes.items()}
    few, all_rows = sizes.rows // 10, sizes.rows
    pairs = [
        ((ADAPTIVE, 0), (SFT, 0)),
        ((STORED, few), (ADAPTIVE, few)),
        ((STORED, all_rows), (ADAPTIVE, all_rows)),
        ((ALWAYS_ON, all_rows), (ADAPTIVE, all_rows)),
    ]
    is_good = True
    for one, other in pairs:
        if one in losses and other in losses:
            gap = abs(losses[one] / losses[other] - 1)
            if not gap <= SAME_LOSS[sizes.precision]:
                print(f"FAIL: the losses of {one} and {other} are {gap:.1e} apart", flush=True)
                is_good = False
    return is_good


def main() -> int:
    """Measures all arms; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="CSV to which rows are added")
    arguments = parser.parse_args()
    device, sizes = torch.device(arguments.device), SIZES[arguments.device]
    common = {
        "stage": "step",
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[sizes.precision],
        "N": sizes.rows * sizes.length,
        "V": sizes.model.vocab_size,
        "H": sizes.model.hidden_size,
    }
    rows = Rows(arguments.out, **provenance(device), **common)
    with tempfile.TemporaryDirectory() as folder:
        return 0 if measure(Bench(sizes, device, Path(folder)), rows) else 1


if __name__ == "__main__":
    sys.exit(main())
