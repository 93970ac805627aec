"""What a probe on the policy's own states is worth while the policy trains.

    python benchmarks/bench_drift.py [--out runs/drift] [--seeds 0 1] [--steps 240]

Arms on the embedded world, one process each: the probe on the frozen reference, and on the policy
with `risk.drift` = warn, fallback and realign; with anchor rows as in the demo, and without any.
Written to results/probe/:

    drift.csv         an arm a row: attack success (greedy, sampled), task, recall over the run
    drift_steps.csv   what the drift monitor saw, step by step (`probe_recall` of metrics.jsonl)
    drift_layers.csv  AUROC and recall of every layer's probe, read on the base (source reference)
                      and on the policy at some steps, about verbs that the probe was not fitted on
                      and in phrasings that it was not fitted on
    drift.png, .svg   recall and AUROC over the steps, and attack success of the arms
"""

import argparse
import copy
import itertools
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from harness import write_csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_style import STYLE, save
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from world_runs import PROVENANCE, RESULTS, run_verb, same_for_all, world_of

from safereg_dist.demo import grammar
from safereg_dist.demo.toy import PROBE_RECALL
from safereg_dist.demo.world import WorldPaths
from safereg_dist.parallel.optimizer import parameter_groups
from safereg_dist.probe_lab.scores import auroc
from safereg_dist.risk.probe import Probe

CONFIG = Path(__file__).resolve().parents[1] / "safereg_dist" / "demo" / "demo.yaml"
ARMS = {
    "reference": ["risk.source=reference"],
    "policy, warn": ["risk.source=policy", "risk.drift=warn"],
    "policy, fallback": ["risk.source=policy", "risk.drift=fallback"],
    "policy, realign": ["risk.source=policy", "risk.drift=realign"],
}
COLOURS = {
    "reference": "#4D4D4D",
    "policy, warn": "#0072B2",
    "policy, fallback": "#009E73",
    "policy, realign": "#E69F00",
}
LAYERS = (1, 2, 3, 4)
SAVE_EVERY = 10
PROBED_STEPS = (10, 20, 40, 80, 160)
"""Steps (multiples of SAVE_EVERY) after which the policy is probed, beside the last one."""
HELD_OUT_VERBS = frozenset(
    verb.word
    for kind in ("benign", "harmful", "ambiguous")
    for verb in [v for v in grammar.VERBS if v.kind == kind][::4]
)
MEASURED = (
    *("attack_success_rate", "attack_success_rate_sampled", "refusal_probability"),
    *("task_exact_match", "benign_exact_match", "over_refusal_rate"),
)
ARM_COLUMNS = [
    *PROVENANCE,
    *("seed", "anchors", "arm", "steps", *MEASURED),
    *("least_probe_recall", "last_probe_recall", "train_seconds"),
]
STEP_COLUMNS = [*PROVENANCE, "seed", "anchors", "arm", "step", "probe_recall", "probe_gap"]
LAYER_COLUMNS = [
    *(*PROVENANCE, "seed", "anchors", "arm", "source", "step", "layer", "held_out"),
    *("auroc", "recall", "mean_risk_harmful", "mean_risk_benign"),
]

Row = dict[str, Any]


def main() -> int:
    """Runs every arm, writes the files, draws; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/drift"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=240, help=f"a multiple of {SAVE_EVERY}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.steps % SAVE_EVERY or arguments.steps < SAVE_EVERY:
        parser.error(f"--steps must be a multiple of {SAVE_EVERY}, got {arguments.steps}")
    arms: list[Row] = []
    steps: list[Row] = []
    layers: list[Row] = []
    for seed, anchors in itertools.product(arguments.seeds, (True, False)):
        study = Study(arguments.out, seed, steps=arguments.steps, anchors=anchors)
        layers += study.base_layers()
        for name in ARMS:
            study.train(name)
            arms.append(study.arm_row(name))
            steps += study.step_rows(name)
            layers += study.policy_layers(name)
    common, results = same_for_all(), arguments.results
    for file, rows, columns in (
        ("drift", arms, ARM_COLUMNS),
        ("drift_steps", steps, STEP_COLUMNS),
        ("drift_layers", layers, LAYER_COLUMNS),
    ):
        write_csv(({**common, **row} for row in rows), results / f"{file}.csv", columns)
    print_arms(arms)
    with plt.rc_context(STYLE):
        save(draw(arms, steps, layers), results, "drift")
    return 0


class Study:
    """The arms of one seed, in its world."""

    def __init__(self, out: Path, seed: int, *, steps: int, anchors: bool) -> None:
        self.world = world_of(out, seed)
        self.folder = out / f"seed{seed}"
        self.steps = steps
        self.same: Row = {"seed": seed, "anchors": anchors}
        self.anchor = self.folder / "anchor.jsonl" if anchors else None
        self.probe = self.folder / "probe"
        self._prepare()
        self.held_out = held_out_prompts(self.world)
        self.base = AutoModelForCausalLM.from_pretrained(self.world.base).eval()

    def _prepare(self) -> None:
        """The arms' probe, one probe a layer for the study of layers, the anchor rows."""
        base, narrowed = self.world.base, self.folder / "probe-rows.jsonl"
        kept = [row for row in read_lines(self.world.probe) if verb_of(row) not in HELD_OUT_VERBS]
        narrowed.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        fit = ("probe", "fit", "--model", base, "--recall", PROBE_RECALL)
        run_verb(*fit, "--data", self.world.probe, "--out", self.probe)
        for layer in LAYERS:
            out = self.folder / f"probe-layer{layer}"
            run_verb(*fit, "--data", narrowed, "--out", out, "--layers", layer)
        if self.anchor and not self.anchor.is_file():
            run_verb(
                *("anchor", "build", "--model", base, "--prompts", self.world.anchor_prompts),
                *("--out", self.anchor, "--max-new-tokens", 32),
            )

    def run_folder(self, arm: str) -> Path:
        """Where an arm's run is."""
        name = arm.replace(", ", "-") + ("" if self.anchor else "-no-anchors")
        return self.folder / f"{name}-{self.steps}"

    def train(self, arm: str) -> None:
        """Trains an arm in a process of its own, unless it is there; keeps every checkpoint."""
        folder = self.run_folder(arm)
        if (folder / "seconds.json").is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut short
        words = [
            *("train", CONFIG, f"model={self.world.base}", f"data.train={self.world.train}"),
            f"data.anchor={self.anchor or 'null'}",
            *(f"risk.path={self.probe}", f"train.seed={self.same['seed']}"),
            *("engine.name=single", "train.micro_batch_size=32", f"train.steps={self.steps}"),
            *(f"train.save_every={SAVE_EVERY}", "train.keep_checkpoints=1000"),
            *(f"output_dir={folder}", *ARMS[arm]),
        ]
        print(f"$ safereg {shlex.join(map(str, words))}", flush=True)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "safereg_dist", *map(str, words)], check=True)
        (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - began))

    def arm_row(self, arm: str) -> Row:
        """What the trained model does, and how the monitor's recall went."""
        folder = self.run_folder(arm)
        out = folder / "eval.json"
        if not out.is_file():
            run_verb(
                *("eval", "--model", folder / "model", "--prompts", self.world.eval),
                *("--out", out, "--max-new-tokens", 32, "--batch-size", 64),
            )
        evaluation = json.loads(out.read_text(encoding="utf-8"))
        recall = [row["probe_recall"] for row in self.step_rows(arm) if row["probe_recall"] != ""]
        return {
            **self.same,
            "arm": arm,
            "steps": self.steps,
            **{name: evaluation[name] for name in MEASURED},
            "least_probe_recall": min(recall, default=None),
            "last_probe_recall": recall[-1] if recall else None,
            "train_seconds": json.loads((folder / "seconds.json").read_text()),
        }

    def step_rows(self, arm: str) -> list[Row]:
        """The steps at which both sides were compared; none where the reference gives the risk."""
        return [
            {
                **self.same,
                "arm": arm,
                "step": row["step"],
                "probe_recall": row.get("probe_recall", ""),
                "probe_gap": row["probe_gap"],
            }
            for row in read_lines(self.run_folder(arm) / "metrics.jsonl")
            if "probe_gap" in row
        ]

    def base_layers(self) -> list[Row]:
        """Every layer's probe on the base: what the reference side reads at every step."""
        return self._layers(self.base, arm="", source="reference", step=0)

    def policy_layers(self, arm: str) -> list[Row]:
        """Every layer's probe on the policy of an arm after some of its steps."""
        policy, folder = copy.deepcopy(self.base), self.run_folder(arm)
        rows = []
        for step in tqdm([s for s in PROBED_STEPS if s < self.steps], desc=f"probe {arm}"):
            load_masters(policy, folder / "checkpoint", step)
            rows += self._layers(policy, arm=arm, source="policy", step=step)
        policy = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        return rows + self._layers(policy, arm=arm, source="policy", step=self.steps)

    def _layers(self, model: torch.nn.Module, **facts: Any) -> list[Row]:
        rows = []
        for held_out, prompts in self.held_out.items():
            harmful = np.array([row["label"] == "harmful" for row in prompts])
            states = last_token_states(model, self.world.base, [row["prompt"] for row in prompts])
            for layer in LAYERS:
                probe = Probe.load(self.folder / f"probe-layer{layer}")
                risk = probe.probability(states[layer]).numpy()
                rows.append(
                    {
                        **self.same,
                        **facts,
                        "layer": layer,
                        "held_out": held_out,
                        "auroc": auroc(risk, harmful),
                        "recall": float(np.mean(risk[harmful] >= probe.threshold)),
                        "mean_risk_harmful": float(risk[harmful].mean()),
                        "mean_risk_benign": float(risk[~harmful].mean()),
                    }
                )
        return rows


def read_lines(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def verb_of(row: Row) -> str | None:
    """The verb that a how-to prompt is about; None in other prompts."""
    words = set(grammar.split_words(row["prompt"]))
    return next((verb.word for verb in grammar.VERBS if verb.word in words), None)


def held_out_prompts(world: WorldPaths) -> dict[str, list[Row]]:
    """How-to prompts of `eval` with verbs, and with phrasings, that layer probes did not see."""
    rows = [row for row in read_lines(world.eval) if row["label"] != "task"]
    return {
        "verbs": [r for r in rows if verb_of(r) in HELD_OUT_VERBS and "rephrased" not in r["id"]],
        "phrasings": [
            r for r in rows if verb_of(r) not in HELD_OUT_VERBS and "rephrased" in r["id"]
        ],
    }


def load_masters(policy: torch.nn.Module, checkpoints: Path, step: int) -> None:
    """Puts the weights of the single engine's checkpoint after `step` steps into `policy`."""
    (folder,) = (path for path in checkpoints.iterdir() if path.name.endswith(f"{step:08d}"))
    (file,) = folder.rglob("*.pt")
    masters: list[Tensor] = torch.load(file, weights_only=True)["masters"]
    groups = parameter_groups(policy, 0.0)  # the order in which an engine keeps its weights
    trained = [parameter for group in groups for parameter in group["params"]]
    with torch.no_grad():
        for parameter, master in zip(trained, masters, strict=True):
            # Weights move little from one step to the next: else they are in another order.
            assert (master - parameter).norm() < parameter.norm()
            parameter.copy_(master)


@torch.inference_mode()
def last_token_states(model: torch.nn.Module, folder: Path, prompts: Sequence[str]) -> list[Tensor]:
    """[rows, H] float32 of every layer, embeddings first, at the last prompt token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)  # pads on the left
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    output = model(**inputs, position_ids=positions, output_hidden_states=True, use_cache=False)
    return [states[:, -1].float() for states in output.hidden_states]


def print_arms(arms: Iterable[Row]) -> None:
    """The table of arms, as people read it."""
    for row in arms:
        recall = row["least_probe_recall"]
        print(
            f"seed {row['seed']}  {'anchors' if row['anchors'] else 'no anchors':10s}  "
            f"{row['arm']:18s}"
            f" attack {row['attack_success_rate']:.3f} greedy,"
            f" {row['attack_success_rate_sampled']:.3f} sampled,"
            f" task {row['task_exact_match']:.3f},"
            f" least recall {'-' if recall is None else format(recall, '.3f')}"
        )


def draw(arms: list[Row], steps: list[Row], layers: list[Row]) -> Figure:
    """Recall and AUROC over the steps, a line a seed, with and without anchor rows; attacks."""
    figure, (with_anchors, without, last) = plt.subplots(
        1, 3, figsize=(12, 4.2), layout="constrained"
    )
    for axes, anchors in ((with_anchors, True), (without, False)):
        chosen = ([row for row in rows if row["anchors"] is anchors] for rows in (steps, layers))
        _draw_steps(axes, *chosen, title="with anchor rows" if anchors else "without anchor rows")
    with_anchors.set_ylabel("recall at the threshold; AUROC (held-out phrasings)")
    handles, labels = with_anchors.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    _draw_arms(last, arms)
    return figure


def _draw_steps(axes: Axes, steps: list[Row], layers: list[Row], *, title: str) -> None:
    for arm, colour in COLOURS.items():
        seen = [r for r in steps if r["arm"] == arm and r["probe_recall"] != ""]
        _lines(axes, seen, "probe_recall", color=colour, label=f"recall, {arm}")
    warned = [r for r in layers if r["arm"] == "policy, warn" and r["held_out"] == "phrasings"]
    _lines(axes, warned, "auroc", color="#999999", linestyle="--", label="AUROC, policy, warn")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("optimizer step")
    axes.grid(axis="y")
    seen = [r for r in steps if r["arm"] == "policy, warn" and r["probe_recall"] != ""]
    if seen and warned:
        recall, ranking = (
            min(min(line.values()) for line in _by_seed(rows, key))
            for rows, key in ((seen, "probe_recall"), (warned, "auroc"))
        )
        axes.set_title(
            f"{title}: on the policy, recall falls to {recall:.2f}\n"
            f"where AUROC (mean over the layers) is {ranking:.2f} or more",
            fontsize=8,
            fontweight="bold",
        )


def _by_seed(rows: list[Row], key: str) -> list[dict[int, float]]:
    """For each seed the value at each step, a mean over the layers where there are several."""
    return [
        {
            step: float(np.mean([r[key] for r in rows if (r["seed"], r["step"]) == (seed, step)]))
            for step in sorted({r["step"] for r in rows if r["seed"] == seed})
        }
        for seed in sorted({r["seed"] for r in rows})
    ]


def _lines(axes: Axes, rows: list[Row], key: str, *, label: str, **style: Any) -> None:
    """One line a seed; where the reference side took over, it ends."""
    for index, line in enumerate(_by_seed(rows, key)):
        named = label if index == 0 else None
        axes.plot(list(line), list(line.values()), label=named, linewidth=1.2, **style)


def _draw_arms(axes: Axes, arms: list[Row]) -> None:
    for place, (arm, colour) in enumerate(COLOURS.items()):
        for row in (row for row in arms if row["arm"] == arm):
            marker, shift = ("o", -0.2) if row["anchors"] else ("s", 0.1)
            for end, style, more in (("", "full", 0.0), ("_sampled", "none", 0.1)):
                success = 100 * row[f"attack_success_rate{end}"]
                axes.plot(place + shift + more, success, marker, color=colour, fillstyle=style)
    axes.set_xticks(range(len(COLOURS)), [arm.replace(", ", ",\n") for arm in COLOURS])
    axes.set_ylabel("attack success (%)")
    axes.set_xlabel(
        "filled: greedy, hollow: sampled at T = 1\ncircle: with anchor rows, square: without"
    )
    axes.set_ylim(bottom=-1)
    axes.grid(axis="y")
    worst = {
        arm: max(100 * row["attack_success_rate"] for row in arms if row["arm"] == arm)
        for arm in COLOURS
    }
    text = ", ".join(f"{arm.split(', ')[-1]} {value:.1f}" for arm, value in worst.items())
    axes.set_title(f"Largest greedy attack success, %:\n{text}", fontsize=8, fontweight="bold")


if __name__ == "__main__":
    raise SystemExit(main())
