"""LLaMA-Factory's ASFT against ours: the divergence, and what a step costs. See asft.sh.

ASFT there:  mean over response tokens of [p(y_t) CE_t + alpha KL(q_t || p_t)], p(y_t) without a
gradient, p the policy, q the reference; the reference sees every row. Ours: 1/N sum_i sum_t
[(1 - b_i) CE_it + b_i KL(q_it || p_it)]; it sees rows with b > 0. So the KL is the same function,
`direction="forward"`: their mean is our sum with weights 1/T, T the number of response tokens.

`agreement`: `difference` is |ours - theirs| / |theirs| of a value, and the largest difference of an
entry over the largest entry of a gradient. Ours multiplies and reduces in float32 whatever it is
given; in the rows of float64 theirs is float64, and `rounding` is how far their own float32 is off.
`asft_loss_func` is their whole loss against itself without the KL, plus alpha times ours.

`step`: forward, backward, clipping and AdamW (one implementation for all) of one micro-batch of
rows of equal length, on one core, float32. `asft` is their trainer's `compute_loss`; `sft again` is
the noise. FLOPs are matrix products, counted. Times are medians over rounds in which every arm has
its turn; `peak_extra_bytes` is what a step holds at most beyond models and optimizer.
"""

import csv
import dataclasses
import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import cell, measure_interleaved, provenance
from llamafactory.train import trainer_utils as theirs
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from step_flops import Rows, counted, llama, write_run_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from safereg_dist.config import (
    Config,
    DataConfig,
    EngineConfig,
    RegularizerConfig,
    RiskConfig,
    TrainConfig,
)
from safereg_dist.data.collation import collate
from safereg_dist.factory import Run, build_run, start_backend
from safereg_dist.parallel.single import SinglePolicy
from safereg_dist.trainer import optimizer_step
from safereg_dist.types import Row
from safereg_kernels import linear_ce_kl, masked_kl

TOKENS, VOCAB, HIDDEN = 257, 1009, 96  # no powers of two
ALPHA, WITHIN = 0.1, 1e-6  # their default; what is claimed
SHARES = (0.0, 0.1, 1.0)
SHAPE = llama(4, 256, vocab=8192)
ROWS = Rows.equal(0.5, length=64, count=10)
ROUNDS, LR = 9, 1e-5
COLUMNS = [
    *("date", "hardware", "commit", "torch", "transformers", "llamafactory", "stage"),
    *(
        "call",
        "quantity",
        "dtype",
        "difference",
        "rounding",
        "arm",
        "risky_share",
        "rows",
        "tokens",
    ),
    *("flops", "median_ms", "q20_ms", "q80_ms", "rounds", "peak_extra_bytes"),
    *("flops_to_sft", "ms_to_sft", "bytes_to_sft", "flops_to_asft", "ms_to_asft", "bytes_to_asft"),
]
Table = list[dict[str, Any]]


# ---- agreement


def agreement_rows() -> Table:
    """Every call of ours against theirs; theirs in float32 against theirs in float64 beside it."""
    half, whole = (Problem.drawn(dtype) for dtype in (torch.float32, torch.float64))
    rows: Table = []
    for call, (own, peer, names) in CALLS.items():
        for problem in (half, whole):
            if call == "asft_loss_func" and problem is whole:
                continue  # theirs rounds the policy's logits to float32
            found, expected = own(problem), peer(problem)
            rounded = peer(half)
            for name, mine, theirs_, nearby in zip(names, found, expected, rounded, strict=True):
                row = {"stage": "agreement", "call": call, "quantity": name}
                row |= {"dtype": str(problem.head.dtype)[6:], "difference": _gap(mine, theirs_)}
                if problem is whole:
                    row["rounding"] = _gap(nearby, theirs_)
                rows.append(row)
    return rows


def agrees(row: dict[str, Any]) -> bool:
    """Within 1e-6, or twice what float32 costs their own."""
    return row["difference"] <= WITHIN + 2 * row.get("rounding", 0.0)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Hidden states and heads of two unlike models, and labels of which some are no response."""

    hidden: Tensor
    head: Tensor
    reference_hidden: Tensor
    reference_head: Tensor
    labels: Tensor

    @classmethod
    def drawn(cls, dtype: torch.dtype) -> "Problem":
        """Logits of standard deviation 2; the same numbers in any dtype, but for its rounding."""
        torch.manual_seed(0)
        sizes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN)) * 2
        tensors = [torch.randn(size, dtype=torch.float64) for size in sizes]
        heads = [tensor * 2 / HIDDEN**0.5 for tensor in tensors[1::2]]
        labels = torch.randint(VOCAB, (TOKENS,)).masked_fill(torch.rand(TOKENS) < 0.3, -100)
        pairs = zip(tensors[::2], heads, strict=True)
        return cls(*(tensor.to(dtype) for pair in pairs for tensor in pair), labels)

    @property
    def weights(self) -> Tensor:
        """1/T at response tokens: a sum with them is their mean."""
        kept = self.labels != -100
        return kept.float() / kept.sum()

    def logits(self) -> tuple[Tensor, Tensor]:
        """The policy's, of which a gradient is wanted, and the reference's."""
        return _leaf(self.hidden @ self.head.T), self.reference_hidden @ self.reference_head.T


def _own_of_logits(problem: Problem) -> list[Tensor]:
    policy, reference = problem.logits()
    return _with_gradients(masked_kl(policy, reference, problem.weights)[0], policy)


def _peer_of_logits(problem: Problem) -> list[Tensor]:
    policy, reference = problem.logits()
    return _with_gradients(theirs._kl_divergence(policy, reference, problem.labels), policy)


def _own_of_hidden(problem: Problem) -> list[Tensor]:
    hidden, head = _leaf(problem.hidden), _leaf(problem.head)
    loss, *_ = linear_ce_kl(
        hidden,
        head,
        problem.labels,
        ce_weights=torch.zeros(TOKENS),
        kl_weights=problem.weights,
        reference_hidden=problem.reference_hidden,
        reference_head=problem.reference_head,
    )
    return _with_gradients(loss, hidden, head)


def _peer_of_hidden(problem: Problem) -> list[Tensor]:
    hidden, head = _leaf(problem.hidden), _leaf(problem.head)
    _, reference = problem.logits()
    loss = theirs._kl_divergence(hidden @ head.T, reference, problem.labels)
    return _with_gradients(loss, hidden, head)


def _own_whole(problem: Problem) -> list[Tensor]:
    """Their loss without the divergence, plus alpha times ours."""
    (policy, reference), (labels, weights) = problem.logits(), _shifted(problem)
    divergence, _ = masked_kl(policy[:-1], reference[:-1], weights)
    loss = theirs.asft_loss_func({"logits": policy[None]}, labels, reference[None], asft_alpha=0.0)
    return _with_gradients(loss + ALPHA * divergence, policy)


def _peer_whole(problem: Problem) -> list[Tensor]:
    (policy, reference), (labels, _) = problem.logits(), _shifted(problem)
    given = {"logits": policy[None]}, labels, reference[None]
    return _with_gradients(theirs.asft_loss_func(*given, asft_alpha=ALPHA), policy)


def _shifted(problem: Problem) -> tuple[Tensor, Tensor]:
    """Labels at their own positions, and 1/T at the positions that predict them."""
    labels = torch.cat([problem.labels.new_full((1,), -100), problem.labels])[:TOKENS]
    kept = labels[1:] != -100
    return labels[None], kept.float() / kept.sum()


CALLS = {
    "masked_kl": (_own_of_logits, _peer_of_logits, ("value", "gradient of logits")),
    "linear_ce_kl": (
        *(_own_of_hidden, _peer_of_hidden),
        ("value", "gradient of hidden", "gradient of head"),
    ),
    "asft_loss_func": (_own_whole, _peer_whole, ("value", "gradient of logits")),
}
"""Name -> ours, theirs, what they return."""


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _with_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _gap(own: Tensor, other: Tensor) -> float:
    """The largest difference over the largest entry of the other."""
    return float((own.double() - other.double()).abs().max() / other.double().abs().max())


# ---- the cost of a step


def step_rows(folder: Path) -> Table:
    """Every arm's FLOPs, time and memory, and their ratios to plain fine-tuning and to ASFT."""
    write_run_folder(folder, SHAPE, ROWS)
    _add_risk(folder / "rows.jsonl")
    plain, adaptive = (_run(folder, objective) for objective in ("none", "convex"))
    rows = plain.sources.rows_of_step(0)
    asft = _asft_step(folder, rows, plain.config)
    calls: dict[tuple[str, float | None], Any] = {
        ("sft", None): partial(_step, plain, rows),
        ("sft again", None): partial(_step, plain, rows),
        ("asft", None): asft,
    }
    for share in SHARES:
        risky = round(share * len(rows))
        given = [dataclasses.replace(r, risk=float(i < risky)) for i, r in enumerate(rows)]
        calls["ours", share] = partial(_step, adaptive, given)
    flops = {key: counted(call).flops for key, call in calls.items()}
    named = {str(key): call for key, call in calls.items()}
    times = measure_interleaved(named, torch.device("cpu"), rounds=ROUNDS)
    table = [
        {
            **{"stage": "step", "dtype": "float32", "arm": arm, "risky_share": share},
            **{"rows": len(rows), "tokens": sum(len(row.input_ids) for row in rows)},
            **{"flops": flops[arm, share], **dataclasses.asdict(times[str((arm, share))])},
        }
        for arm, share in calls
    ]
    for row in table:
        for peer in ("sft", "asft"):
            (other,) = (each for each in table if each["arm"] == peer)
            for name, of in (
                ("flops", "flops"),
                ("ms", "median_ms"),
                ("bytes", "peak_extra_bytes"),
            ):
                row[f"{name}_to_{peer}"] = row[of] / other[of]
    return table


def _add_risk(path: Path) -> None:
    """A run wants a column where its rows have a risk; each arm replaces it."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps({**row, "risk": 0.0}) + "\n" for row in rows))


def _run(folder: Path, objective: str) -> Run:
    is_plain = objective == "none"
    config = Config(
        model=str(folder / "model"),
        data=DataConfig(train=str(folder / "rows.jsonl")),
        risk=RiskConfig(estimator="none" if is_plain else "column"),
        regularizer=RegularizerConfig(objective=objective),  # type: ignore[arg-type]
        train=TrainConfig(epochs=100, micro_batch_size=len(ROWS.prompts), precision="fp32"),
        engine=EngineConfig(name="single"),
        output_dir=str(folder / f"run-{objective}"),
    )
    return build_run(config, start_backend(config))


def _step(run: Run, rows: list[Row]) -> None:
    risky = sum(bool(row.risk) for row in rows)
    done = optimizer_step(run, rows, step=0, lr=LR)
    assert done.totals.sums["reference_rows"] == risky, "the reference must run on risky rows alone"


def _asft_step(folder: Path, rows: list[Row], config: Config) -> Any:
    """Their trainer's loss of the same rows, and our update."""
    model, reference = (
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        for _ in range(2)
    )
    engine, batch = SinglePolicy(model.train(), config), collate(rows, pad_id=0)
    labels = torch.full_like(batch.input_ids, -100)
    for labelled, row in zip(labels, rows, strict=True):
        mask = torch.tensor(row.loss_mask, dtype=torch.bool)
        labelled[: len(mask)][mask] = torch.tensor(row.input_ids)[mask]
    trainer = SimpleNamespace(
        finetuning_args=SimpleNamespace(use_asft_loss=True),
        ref_model=reference.eval(),
        compute_loss_func=partial(theirs.asft_loss_func, asft_alpha=ALPHA),
    )
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": torch.ones_like(batch.input_ids),
        "labels": labels,
    }

    def step() -> None:
        loss = CustomSeq2SeqTrainer.compute_loss(trainer, model, inputs)  # type: ignore[arg-type]
        engine.backward(loss, is_last=True)
        engine.update(LR)

    return step


# ---- the file


def main() -> int:
    """Writes the table; 1 where the divergences differ by more than rounding."""
    folder, results = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = agreement_rows()
    rows = found + step_rows(folder)
    versions = {name: version(name) for name in ("transformers", "llamafactory")}
    common = {**provenance(torch.device("cpu")), **versions}
    with results.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        for row in rows:
            known = {key: cell(value) for key, value in {**common, **row}.items()}
            writer.writerow({key: known[key] for key in COLUMNS if key in known})
            print(json.dumps({key: cell(value) for key, value in row.items()}), flush=True)
    print(f"written: {results}")
    return int(not all(map(agrees, found)))


if __name__ == "__main__":
    sys.exit(main())
