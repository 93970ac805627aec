"""Claimed: a Trainer's run has the numbers of the plain Trainer, of float64 and of eager code.

Rounds, with what was measured on a CPU. Without risk a run equals the plain Trainer's: first loss
the same bits, twelve steps later 2e-7 of the losses and 4e-7 in the weights, since the head sums in
another order than transformers. The first loss is 1e-7 from float64, under bf16 autocast 1e-3. A
compiled run equals the eager one within 1e-5 and compiles nothing after its first steps.
"""

import pytest
import torch
from support.builders import tiny_model
from support.trainer_runs import (
    SMALL,
    Losses,
    features,
    settings,
    trainer,
    weights,
    write_reference,
)
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from safereg_dist.integrations.trainer import SafeRegTrainer

SEQUENTIAL = {"train_sampling_strategy": "sequential"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("reference"))


def run(folder, rows, *, cls=SafeRegTrainer, args=None, callbacks=(), **how):
    seen = Losses()
    made = trainer(
        folder,
        cls=cls,
        model=tiny_model(**SMALL),
        train_dataset=rows,
        callbacks=[seen, *callbacks],
        args=args or {},
        **how,
    )
    made.train()
    return seen.losses, weights(made.model)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_without_risk_it_is_the_plain_trainer(reference, tmp_path, optim):
    rows = [row | {"risk": 0.0} for row in features(60)]
    args = {"optim": optim, "max_steps": 12, "max_grad_norm": 0.0}
    ours, own = run(tmp_path / "own", rows, args=args, safereg=settings(reference))
    theirs, plain = run(tmp_path / "plain", rows, args=args, cls=Trainer)
    assert ours[0] == pytest.approx(theirs[0], rel=2e-7)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert max(float((own[name] - plain[name]).abs().max()) for name in own) < 5e-6


@torch.no_grad()
def exact_loss(rows, reference):
    """sum of CE of harmless and of KL(reference || policy) of risky rows, a token; in float64."""
    policy = tiny_model(**SMALL).double()
    frozen = AutoModelForCausalLM.from_pretrained(reference).double()
    total = count = 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        own, other = (m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (policy, frozen))
        kept = labels != -100
        ce = functional.nll_loss(own[kept], labels[kept], reduction="none")
        divergence = (other.exp() * (other - own)).sum(-1)[kept]
        total += float((divergence if row["risk"] >= 0.5 else ce).sum())
        count += int(kept.sum())
    return total / count


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 2e-6), (True, 1e-2)])
def test_first_loss_against_float64(reference, tmp_path, bf16, tolerance):
    rows = features(8)
    args = SEQUENTIAL | {"max_steps": 1, "bf16": bf16}
    losses, _ = run(tmp_path, rows, args=args, safereg=settings(reference))
    assert losses[0] == pytest.approx(exact_loss(rows[:4], reference), rel=tolerance)


class Graphs(TrainerCallback):
    """Graphs that torch's compiler has made by the end of each step."""

    def __init__(self):
        self.made = []

    def on_step_end(self, args, state, control, **_):
        self.made.append(counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_compiled(reference, tmp_path):
    rows, graphs = features(40), Graphs()
    args = SEQUENTIAL | {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    eager, _ = run(tmp_path / "eager", rows, args=SEQUENTIAL, safereg=settings(reference))
    torch._dynamo.reset()
    counters.clear()
    compiled, _ = run(
        tmp_path / "own", rows, args=args, callbacks=[graphs], safereg=settings(reference)
    )
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert graphs.made[0] >= 1
    assert len(set(graphs.made[1:])) == 1  # shapes became dynamic in the second step
