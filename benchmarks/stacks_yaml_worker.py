"""Runs and judges of benchmarks/stacks_yaml.sh, inside the environment of one stack.

    stacks_yaml_worker.py write FOLDER                    models and rows
    stacks_yaml_worker.py train CASE FOLDER               one run, on any number of ranks
    stacks_yaml_worker.py judge CASE FOLDER RESULTS.csv   the run against float64; writes a row
    stacks_yaml_worker.py compare STACK FOLDER            all risks 0 against the stack without us

CASE is STACK[-packed]-RANKS, or STACK-plain and STACK-zero. A run keeps the very batches that the
stack trained on; the judge reads nothing else of it but losses, gradients and `risk_unknown`.
"""

import csv
import itertools
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # `support`
STEPS = {"plain": 5, "zero": 5}
LR, ACCUMULATION, ROWS, LENGTH, THRESHOLD = 1e-3, 2, 3, 96, 0.5
COLUMNS = (
    "stack,library_version,ranks,accumulation,precision,first_loss_relative_error,"
    "gradient_relative_error,loss_after_20_relative_error,reference,parameter_bytes_over_ideal"
).split(",")
KEY = ("stack", "ranks", "accumulation", "precision")
"""Columns that say which run a row is of."""


def write(folder: Path) -> None:
    """`policy` and `reference`, and rows as alpaca and as messages, scored, and all of risk 0."""
    from support.builders import random_rows, save_model, tiny_model, write_jsonl

    for name, seed in (("policy", 0), ("reference", 5)):
        save_model(folder / name, tiny_model(seed=seed))
    drawn = {}
    for row in random_rows(900, longest=12):
        drawn.setdefault(row["response"], row)  # the judge tells rows apart by their answers
    rows = list(drawn.values())[:600]
    alpaca = [
        {
            "instruction": row["prompt"],
            "input": other["prompt"] if index % 2 else "",
            "output": row["response"],
            "risk": row["risk"],
        }
        for index, (row, other) in enumerate(zip(rows, reversed(rows), strict=True))
    ]
    even = [row for row in alpaca if len(row["output"].split()) == 4] * 3
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ],
            "risk": row["risk"],
        }
        for row in rows
    ]
    for name, given in (("alpaca", alpaca), ("even", even), ("chat", chats)):
        bare = [{key: value for key, value in row.items() if key != "risk"} for row in given]
        write_jsonl(folder / f"{name}.jsonl", bare)
        write_jsonl(folder / f"{name}-scored.jsonl", given)
    write_jsonl(folder / "even-zero.jsonl", [{**row, "risk": 0.0} for row in even])
    tags = {"role_tag": "role", "content_tag": "content"}
    chat = {
        "file_name": "chat.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {**tags, "user_tag": "user", "assistant_tag": "assistant"},
    }
    info = {"alpaca": {"file_name": "alpaca.jsonl"}, "even": {"file_name": "even.jsonl"}}
    (folder / "dataset_info.json").write_text(json.dumps({**info, "chat": chat}))


def configuration(case: str, folder: Path) -> dict:
    """The stack's own YAML of a case."""
    stack, *kind = case.split("-")
    is_packed, is_even = "packed" in kind, kind[-1] in STEPS
    data = "even" if is_even else "chat" if is_packed else "alpaca"
    common = {
        "output_dir": str(folder / case),
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS.get(kind[-1], 20),
        "learning_rate": LR,
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    }
    if "plain" not in kind:
        scored = "even-zero" if "zero" in kind else f"{data}-scored"
        common["safereg"] = {
            "reference": {"model": str(folder / "reference")},
            "risk": {"estimator": "lookup", "path": str(folder / f"{scored}.jsonl")},
            "regularizer": {"threshold": THRESHOLD},
        }
    if stack == "axolotl":
        plugin = "safereg_dist.integrations.axolotl.SafeRegPlugin"
        form = {"type": "chat_template", "chat_template": "tokenizer_default"}
        return common | {
            "base_model": str(folder / "policy"),
            "plugins": [] if "plain" in kind else [plugin],
            "datasets": [
                {"path": str(folder / f"{data}.jsonl"), "ds_type": "json"}
                | (form if data == "chat" else {"type": "alpaca"})
            ],
            "dataset_prepared_path": str(folder / case / "prepared"),
            "sequence_len": LENGTH,
            "sample_packing": is_packed,
            "pad_to_sequence_len": is_packed,
            "micro_batch_size": ROWS,
            "num_epochs": 9,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "val_set_size": 0,
            "dataset_num_proc": 1,
            "attn_implementation": "sdpa",
            "special_tokens": {"pad_token": "<pad>"},
        }
    return common | {
        "model_name_or_path": str(folder / "policy"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(folder),
        "dataset": data,
        "template": "default",
        "cutoff_len": LENGTH,
        "overwrite_cache": True,
        "overwrite_output_dir": True,
        "preprocessing_num_workers": 1,
        "neat_packing": is_packed,
        "per_device_train_batch_size": ROWS,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "ddp_timeout": 600,
    }


# ---- the run


def train(case: str, folder: Path) -> None:
    """Trains a case with the stack's own entry, and keeps what it was given and what it gave."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    path = folder / f"{case}-{rank}.yaml"
    given = configuration(case, folder)
    path.write_text(yaml.safe_dump(given))
    kept = {"batches": [], "losses": [], "ends": [0], "gradients": {}}
    _watch(kept)
    if case.startswith("axolotl"):
        from axolotl.cli.train import do_cli

        _stay_on_cpu()
        do_cli(config=str(path))
    elif case.endswith("plain"):
        from llamafactory.train.tuner import run_exp

        run_exp(given)
    else:
        from safereg_dist.integrations.llamafactory import main

        assert main([str(path)]) == 0
    torch.save(kept, folder / f"{case}-{rank}.pt")


def _stay_on_cpu() -> None:
    """Lets axolotl's ranks load where there are no GPUs; it would place them on GPU 0 and 1."""
    from axolotl.loaders.model import ModelLoader

    plain = ModelLoader._set_device_map_config

    def set_device_map(self):
        plain(self)
        self.model_kwargs["device_map"] = {"": "cpu"}

    ModelLoader._set_device_map_config = set_device_map


def _watch(kept: dict) -> None:
    from transformers import Trainer, TrainerCallback

    class FirstGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            if not kept["gradients"]:
                for name, parameter in model.named_parameters():
                    name = name.removeprefix("module.")
                    kept["gradients"][name] = parameter.grad.detach().clone()

        def on_step_end(self, args, state, control, **_):
            kept["ends"].append(len(kept["losses"]))

    plain_init, plain_step = Trainer.__init__, Trainer.training_step

    def init(self, *args, **kwargs):
        plain_init(self, *args, **kwargs)
        self.add_callback(FirstGradients())

    def training_step(self, model, inputs, *args, **kwargs):
        names = ("input_ids", "labels", "position_ids", "attention_mask")
        kept["batches"].append({n: inputs[n].clone() for n in names if inputs.get(n) is not None})
        loss = plain_step(self, model, inputs, *args, **kwargs)
        kept["losses"].append(loss.item())
        return loss

    Trainer.__init__, Trainer.training_step = init, training_step


def losses_of(runs: list[dict]) -> list[float]:
    """The loss of every step: the sum over its micro-batches, the mean over ranks."""
    return [sum(sum(run["losses"][window]) for run in runs) / len(runs) for window in windows(runs)]


def windows(runs: list[dict]) -> list[slice]:
    """The micro-batches of every step; the last of an epoch may have fewer."""
    ends = runs[0]["ends"]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


# ---- the judge


def judge(case: str, folder: Path, results: Path) -> None:
    """Writes a row of errors against float64, computed row by row from the kept batches."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stack, *kind = case.split("-")
    ranks = int(kind[-1])
    runs = [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(ranks)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    scored = folder / ("chat-scored.jsonl" if "packed" in kind else "alpaca-scored.jsonl")
    risks = {_answer(row): row["risk"] for row in map(json.loads, scored.open())}
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float64)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    expected, gradients, seen = [], {}, 0
    for window in windows(runs):
        rows = [row for run in runs for batch in run["batches"][window] for row in _rows(batch)]
        seen += len(rows)
        count = sum(len(labels[labels != -100]) for _, labels in rows)
        loss = torch.zeros((), dtype=torch.float64)
        for ids, labels in rows:
            text = tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
            is_risky = risks[text.strip()] >= THRESHOLD
            loss = loss + _row_loss(policy, reference, ids, labels, is_risky) / count
        loss.backward()
        expected.append(loss.item())
        gradients = gradients or {n: p.grad.clone() for n, p in policy.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    found = losses_of(runs)
    worst = max(
        float((runs[0]["gradients"][name].double() - grad).norm() / grad.norm())
        for name, grad in gradients.items()
    )
    metrics = [json.loads(line) for line in (folder / case / "metrics.jsonl").open()]
    unknown = sum(row["risk_unknown"] for row in metrics)
    print(f"{case}: {seen} rows in {len(found)} steps, {unknown} of them not found in the file")
    assert unknown == 0, "every row must be found"
    assert 0 < sum(row["active_rows"] for row in metrics) < seen
    values = [
        stack + ("-packed" if "packed" in kind else ""),
        version(stack),
        ranks,
        ACCUMULATION,
        "fp32",
        f"{abs(found[0] / expected[0] - 1):.1e}",
        f"{worst:.1e}",
        f"{abs(found[-1] / expected[-1] - 1):.1e}",
        "fsdp2" if ranks > 1 else "whole",
        "",
    ]
    write_row(results, [str(value) for value in values])
    print(dict(zip(COLUMNS, values, strict=True)))
    assert abs(found[0] / expected[0] - 1) < 1e-5
    assert worst < 1e-4


def write_row(path: Path, values: list[str]) -> None:
    """Puts a row into the table, in the place of the one of the same `KEY`, else at its end."""
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            _, *rows = csv.reader(file)
    own = [values[COLUMNS.index(name)] for name in KEY]
    keys = [[row[COLUMNS.index(name)] for name in KEY] for row in rows]
    place = keys.index(own) if own in keys else len(rows)
    rows[place : place + 1] = [values]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def _answer(row: dict) -> str:
    return row["output"] if "output" in row else row["messages"][-1]["content"]


def _rows(batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels) of the rows with an answer; position ids start again at each."""
    found = []
    for line in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][line], batch["labels"][line].clone()
        firsts = [0]
        if "position_ids" in batch:
            firsts = torch.nonzero(batch["position_ids"][line] == 0).flatten().tolist()
        for first, last in zip(firsts, [*firsts[1:], len(ids)], strict=True):
            own, own_labels = ids[first:last], labels[first:last].clone()
            own_labels[0] = -100
            if (own_labels != -100).any():
                end = int(torch.nonzero(own_labels != -100).max()) + 1  # what follows is padding
                found.append((own[:end], own_labels[:end]))
    return found


def _row_loss(policy, reference, ids, labels, is_risky: bool) -> torch.Tensor:
    """The sum over the answer of CE, or of KL(reference || policy) where the row is risky."""
    is_answer = labels[1:] != -100
    own = policy(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[is_answer]
    if not is_risky:
        return -own.gather(1, labels[1:][is_answer][:, None]).sum()
    with torch.no_grad():
        frozen = reference(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[is_answer]
    return (frozen.exp() * (frozen - own)).sum()


def compare(stack: str, folder: Path) -> None:
    """Prints how far five losses with all risks 0 are from those of the stack alone."""
    plain, zero = (
        [torch.load(folder / f"{stack}-{kind}-0.pt", weights_only=True)]
        for kind in ("plain", "zero")
    )
    for left, right in zip(plain[0]["batches"], zero[0]["batches"], strict=True):
        assert torch.equal(left["input_ids"], right["input_ids"])
    pairs = list(zip(losses_of(plain), losses_of(zero), strict=True))
    worst = max(abs(right / left - 1) for left, right in pairs)
    print(f"{stack}: all risks 0 against {stack} alone, {len(pairs)} losses: {worst:.1e} at worst")
    assert len(pairs) == 5
    assert worst < 1e-5


def main() -> None:
    verb, *rest = sys.argv[1:]
    if verb == "write":
        write(Path(rest[0]))
    elif verb == "train":
        train(rest[0], Path(rest[1]))
    elif verb == "judge":
        judge(rest[0], Path(rest[1]), Path(rest[2]))
    else:
        compare(rest[0], Path(rest[1]))


if __name__ == "__main__":
    main()
