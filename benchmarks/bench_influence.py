"""What `risk.estimator: influence` sees of disguised harm, beside probes, and what it costs.

    python benchmarks/bench_influence.py [--out runs/influence] [--seeds 0 1]

On the embedded world, as `bench_response_risk.py`: linear probes on prompts and on responses are
fitted on plain exchanges alone. Influence is given 32 plain harmful prompts with the base's refusal
(a complying answer begins with "first") and 200 plain benign rows, which set its scale; it is no
fit. All are of training pairs. Then rows about held-out pairs are scored, disguised in seven ways:
recall where at most 1 % and 5 % of the benign rows of the same disguise and of none are flagged,
and AUROC. `max` is the product's: the larger of the three, each rescaled to its own threshold.
`recall` and `false_positive_rate` are at that threshold, among the rows of the disguise alone:
what was calibrated on plain rows need not hold on disguised ones.

Probes go through `safereg probe fit` and `score`, influence through `safereg audit`. Other forms of
influence that were tried are measured from the same states (`is_attempt`), and so is the gradient
of all weights, by a backward per row: what the head alone may miss. Writes results/probe/
influence.csv with a figure (png, svg), and influence_cost.csv: matrix products, without values.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from bench_probe_flops import head_flops
from bench_response_risk import conversation, scores_of, threshold_at
from harness import write_csv
from matplotlib.figure import Figure
from plot_style import STYLE, save
from real_shapes import REAL_SHAPES, RealModel
from step_flops import counted
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from world_runs import PROVENANCE, RESULTS, run_verb, same_for_all, world_of

from safereg_dist.config import DataConfig, InfluenceConfig
from safereg_dist.data import load_tokenizer, tokenize_row
from safereg_dist.data.canary import watched_rows
from safereg_dist.demo.attacks import KINDS, write_attacks
from safereg_dist.demo.grammar import REFUSED_ACT
from safereg_dist.probe_lab.scores import auroc
from safereg_dist.risk.influence import (
    Direction,
    aligned_tokens,
    direction_of,
    token_errors,
    token_influence,
)
from safereg_dist.types import Head, head_of
from safereg_dist.types import Row as TokenRow

SIGNALS = ("prompt", "response", "influence", "max")
RATES = (0.01, 0.05)
WATCHED, BENIGN = 32, 200
SETTINGS = {"refusal": REFUSED_ACT, "complying": "first", "prompts": WATCHED}
COLUMNS = [*PROVENANCE, *("seed", "kind", "signal", "is_attempt")]
COLUMNS += ["recall_at_fpr_1", "recall_at_fpr_5", "auroc", "recall", "false_positive_rate"]
COLUMNS += ["harmful", "benign"]
COST_COLUMNS = [*PROVENANCE, "model", "H", "V", "tokens", "response_tokens", "watched_tokens"]
COST_COLUMNS += ["tokens_per_row", "head_flops", "reference_flops", "step_flops"]
COST_COLUMNS += ["head_share", "reference_share"]

Row = dict[str, Any]
Risks = dict[str, float]


def main() -> int:
    """Measures, writes, draws, prints; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/influence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    common = same_for_all()
    costs = [{**common, **row} for row in cost_rows()]
    write_csv(costs, arguments.results / "influence_cost.csv", COST_COLUMNS)
    rows = [row for seed in arguments.seeds for row in measure(arguments.out, seed)]
    write_csv(({**common, **r} for r in rows), arguments.results / "influence.csv", COLUMNS)
    with plt.rc_context(STYLE):
        save(draw(rows), arguments.results, "influence")
    print_tables(rows, costs)
    return 0


def measure(out: Path, seed: int) -> Iterator[Row]:
    """One row for each kind and signal, in the world of one seed."""
    world, folder = world_of(out, seed), out / f"seed{seed}"
    attacks, exchanges = write_attacks(folder, seed=seed)
    labelled, plain = read_jsonl(attacks), read_jsonl(exchanges)
    data = write_jsonl(folder / "conversations.jsonl", map(conversation, labelled))
    watched = write_jsonl(folder / "watched.jsonl", watched_prompts(plain))
    found = {
        position: probe_risks(position, world.base, exchanges, data, folder)
        for position in ("prompt", "response")
    }
    found["influence"] = influence_risks(world.base, data, watched, folder)
    found["max"] = {name: max(risks[name] for risks in found.values()) for name in found["prompt"]}
    tried = attempts(world.base, labelled, watched)
    for signal, risk in {**found, **tried}.items():
        for kind in KINDS:
            yield {
                **{"seed": seed, "kind": kind, "signal": signal, "is_attempt": signal in tried},
                **merits(scores_of(kind, labelled, risk)),
                **({} if signal in tried else at_threshold(kind, labelled, risk)),
            }


def merits(of_label: dict[str, np.ndarray]) -> Row:
    """Recall at each rate of false positives, AUROC, and how many rows there are."""
    harmful, benign = of_label["harmful"], of_label["benign"]
    recalls = (float(np.mean(harmful >= threshold_at(benign, rate))) for rate in RATES)
    labels = np.repeat([1, 0], [len(harmful), len(benign)])
    return {
        **{f"recall_at_fpr_{rate:.0%}"[:-1]: r for rate, r in zip(RATES, recalls, strict=True)},
        "auroc": auroc(np.concatenate([harmful, benign]), labels),
        "harmful": len(harmful),
        "benign": len(benign),
    }


def at_threshold(kind: str, labelled: Sequence[Row], risk: Risks) -> Row:
    """Shares of a kind's own rows at or above a risk of 0.5, each signal's threshold."""
    shares = (
        np.mean(
            [risk[r["id"]] >= 0.5 for r in labelled if (r["kind"], r["label"]) == (kind, label)]
        )
        for label in ("harmful", "benign")
    )
    return dict(zip(("recall", "false_positive_rate"), map(float, shares), strict=True))


# ---- what the product gives


def watched_prompts(exchanges: Sequence[Row]) -> list[Row]:
    """Plain harmful prompts, which the base refuses, and plain benign rows with their answers."""
    of_label = {
        label: [row for row in exchanges if row["label"] == label]
        for label in ("harmful", "benign")
    }
    step = len(of_label["benign"]) // BENIGN
    harmful = [
        {"prompt": row["prompt"], "label": "harmful"} for row in of_label["harmful"][:WATCHED]
    ]
    return [*harmful, *of_label["benign"][::step][:BENIGN]]


def probe_risks(position: str, base: Path, exchanges: Path, data: Path, folder: Path) -> Risks:
    """By id, from a linear probe that is fitted on the exchanges."""
    probe, scored = folder / f"probe-{position}", folder / f"{position}.jsonl"
    run_verb(
        *("probe", "fit", "--model", base, "--data", exchanges, "--out", probe),
        *("--position", position),
    )
    scored.unlink(missing_ok=True)
    run_verb("score", "--probe", probe, "--model-path", base, "--data", data, "--out", scored)
    return {row["id"]: row["risk"] for row in read_jsonl(scored)}


def influence_risks(base: Path, data: Path, watched: Path, folder: Path) -> Risks:
    """By id, from an audit of the rows."""
    risk = {"estimator": "influence", "path": str(watched), "influence": SETTINGS}
    config = {
        "model": str(base),
        "data": {"train": str(data)},
        "risk": {**risk, "cache": "none"},
        "train": {"precision": "fp32", "micro_batch_size": 16},
        "engine": {"name": "single"},
        "output_dir": str(folder / "run"),
    }
    (folder / "influence.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run_verb("audit", folder / "influence.yaml", "--out", folder / "audit")
    return {row["id"]: row["risk"] for row in read_jsonl(folder / "audit" / "rows.jsonl")}


# ---- what else was tried


Pair = tuple[Tensor, Tensor]
"""States and labels of response tokens."""


def attempts(base: Path, labelled: Sequence[Row], watched: Path) -> dict[str, Risks]:
    """Name -> values by id of other forms of influence: the worst token's unless it says other."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = load_tokenizer(str(base), DataConfig(train=""))
    head = head_of(model)
    rows = {
        row["id"]: tokenize_row(conversation(row), row["id"], tokenizer, default_id="")
        for row in labelled
    }
    pairs = {name: states_of(model, row) for name, row in rows.items()}
    watch = watched_rows(str(watched), InfluenceConfig(**SETTINGS), tokenizer)
    both = [joined([states_of(model, row) for row in part]) for part in watch[:2]]
    first = [joined([head_part(states_of(model, row), 1) for row in part]) for part in watch[:2]]
    main = direction_of(*both, head)
    alone = direction_of(both[0], head_part(both[1], 0), head)
    at_first = direction_of(*first, head)
    off_benign = without(main, [states_of(model, row) for row in watch.benign], head)

    def worst(pair: Pair, direction: Direction) -> float:
        return token_influence(*pair, direction, head).max().item()

    def screened(pair: Pair, count: int) -> float:
        places = aligned_tokens(pair[0], main, count)
        return worst((pair[0][places], pair[1][places]), main)

    forms: dict[str, Callable[[Pair], float]] = {
        "no contrast": lambda pair: worst(pair, alone),
        "first watched token": lambda pair: worst(pair, at_first),
        "off the benign gradient": lambda pair: worst(pair, off_benign),
        "sum over the row": lambda pair: token_influence(*pair, main, head).sum().item(),
        "cosine of the row": lambda pair: cosine(pair, main, head),
        "first 4 tokens": lambda pair: worst(head_part(pair, 4), main),
        "4 most aligned tokens": lambda pair: screened(pair, 4),
    }
    found = {name: {key: form(pair) for key, pair in pairs.items()} for name, form in forms.items()}
    return found | {"gradient of all weights": whole_gradients(model, watch[:2], rows)}


@torch.no_grad()
def states_of(model: Any, row: TokenRow) -> Pair:
    """The states that predict the row's response tokens, and these."""
    places = [t for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
    ids = torch.tensor([row.input_ids])
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    return hidden[[t - 1 for t in places]], ids[0, places]


def joined(pairs: Sequence[Pair]) -> Pair:
    """One pair of all tokens."""
    states, labels = zip(*pairs, strict=True)
    return torch.cat(states), torch.cat(labels)


def head_part(pair: Pair, count: int) -> Pair:
    """The first `count` tokens."""
    return pair[0][:count], pair[1][:count]


@torch.no_grad()
def without(direction: Direction, benign: Sequence[Pair], head: Head) -> Direction:
    """The direction with the mean gradient of benign rows projected out of it."""
    states, labels = joined(benign)
    own = Direction(token_errors(states, labels, head), states)
    share = _inner(direction, own) / _inner(own, own)
    left = torch.cat([direction.errors, -share * own.errors])
    return Direction(left, torch.cat([direction.states, own.states]))


@torch.no_grad()
def cosine(pair: Pair, direction: Direction, head: Head) -> float:
    """Of the row's whole gradient and the direction."""
    own = Direction(token_errors(*pair, head), pair[0])
    return (_inner(own, direction) / _inner(own, own).sqrt()).item()


def _inner(a: Direction, b: Direction) -> Tensor:
    return ((a.errors @ b.errors.T) * (a.states @ b.states.T)).sum()


def whole_gradients(
    model: Any, watched: Sequence[Sequence[TokenRow]], rows: dict[str, TokenRow]
) -> Risks:
    """Cosine of each row's gradient on all weights with the watched: a backward per row."""
    parameters = list(model.parameters())

    def gradient(chosen: Sequence[TokenRow]) -> list[Tensor]:
        total = torch.zeros(())
        for row in chosen:
            ids = torch.tensor([row.input_ids])
            labels = ids.masked_fill(torch.tensor([row.loss_mask]) == 0, -100)
            logits = model(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits, labels[0, 1:], reduction="sum"
            )
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return [p.new_zeros(()) if g is None else g for g, p in zip(found, parameters, strict=True)]

    def inner(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))

    refusing, complying = map(gradient, watched)
    towards = [c - r for c, r in zip(complying, refusing, strict=True)]
    values = {}
    for name, row in rows.items():
        own = gradient([row])
        values[name] = inner(own, towards) / inner(own, own) ** 0.5
    return values


# ---- what it costs


def cost_rows() -> Iterator[Row]:
    """Matrix products for one row of 1024 tokens, half of it response, on real shapes."""
    length, responses, settings = 1024, 512, InfluenceConfig()
    watched = 2 * settings.prompts * settings.positions
    for name, shape in REAL_SHAPES.items():
        model, size, vocab = RealModel(shape), shape.hidden_size, shape.vocab_size
        step = model.trunk(length).flops + head_flops(shape, responses)
        reference = model.prefix(length, shape.num_hidden_layers).flops
        work = partial(influence_without_values, responses, watched, size, vocab, settings)
        own = counted(work).flops
        yield {
            **{"model": name, "H": size, "V": vocab, "tokens": length},
            **{"response_tokens": responses, "watched_tokens": watched},
            "tokens_per_row": settings.tokens_per_row,
            **{"head_flops": own, "reference_flops": reference, "step_flops": step},
            **{"head_share": own / step, "reference_share": reference / step},
        }


def influence_without_values(
    tokens: int, watched: int, size: int, vocab: int, settings: InfluenceConfig
) -> None:
    """The work of `row_influence` for one row, without values."""
    with FakeTensorMode():
        head = Head(torch.nn.Parameter(torch.empty(vocab, size)), None, None, 1.0)
        direction = Direction(torch.empty(watched, vocab), torch.empty(watched, size))
        states, labels = torch.empty(tokens, size), torch.empty(tokens, dtype=torch.int64)
        places = aligned_tokens(states, direction, settings.tokens_per_row)
        token_influence(states[places], labels[places], direction, head, head_bytes=1 << 30)


# ---- what is shown


def mean_of(rows: Sequence[Row], column: str, signals: Sequence[str]) -> np.ndarray:
    """[kinds, signals] mean over the seeds."""
    cells = [
        [[r[column] for r in rows if (r["kind"], r["signal"]) == (k, s)] for s in signals]
        for k in KINDS
    ]
    return np.asarray(cells).mean(axis=-1)


def draw(rows: Sequence[Row]) -> Figure:
    """Two heat maps, one for each rate: a kind a line, a signal a column."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained", sharey=True)
    names = {"recall_at_fpr_1": "1 %", "recall_at_fpr_5": "5 %"}
    for axes, (column, rate) in zip(panels, names.items(), strict=True):
        recall = mean_of(rows, column, SIGNALS)
        axes.imshow(recall, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (line, place), value in np.ndenumerate(recall):
            colour = "black" if value > 0.5 else "white"
            axes.text(place, line, f"{value:.2f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(SIGNALS)), ["probe,\nprompt", "probe,\nresponse", *SIGNALS[2:]])
        axes.set_xlabel(f"recall at {rate} false positives, mean over the seeds")
    panels[0].set_yticks(range(len(KINDS)), [kind.replace("_", " ") for kind in KINDS])
    panels[0].set_ylabel("how the harm is disguised")
    recall = mean_of(rows, "recall_at_fpr_5", SIGNALS)[1:]  # the first kind is no attack
    above = (recall[:, 2] > recall[:, :2].max(axis=1)).sum()
    half = (recall[:, 2] >= 0.5).sum()
    figure.suptitle(
        f"Of {len(recall)} disguises influence sees more than either probe in {above} at 5 % false "
        f"positives,\nand half the harm in {half}",
        fontsize=10,
        fontweight="bold",
    )
    return figure


def print_tables(rows: Sequence[Row], costs: Sequence[Row]) -> None:
    """Recall at both rates and AUROC of every signal by kind; the cost."""
    signals = list(dict.fromkeys(row["signal"] for row in rows))
    for column in ("recall_at_fpr_1", "recall_at_fpr_5", "auroc"):
        print(f"{column:26s}" + "".join(f"{kind:>16s}" for kind in KINDS))
        for signal, line in zip(signals, mean_of(rows, column, signals).T, strict=True):
            print(f"{signal:26s}" + "".join(f"{value:16.3f}" for value in line))
    for signal in SIGNALS:
        held = [mean_of(rows, c, [signal])[:, 0] for c in ("recall", "false_positive_rate")]
        for name, line in zip(("harmful", "benign"), held, strict=True):
            text = f"{signal}: {name} at 0.5"
            print(f"{text:26s}" + "".join(f"{value:16.3f}" for value in line))
    for row in costs:
        print(
            f"{row['model']}: head part {row['head_share']:.3%} of a step, the reference's forward "
            f"{row['reference_share']:.1%}, once"
        )


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: Any) -> Path:
    """Writes the rows; its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
