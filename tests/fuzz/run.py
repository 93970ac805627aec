"""Gives the verbs hostile files, counts how they end; the table is `benchmarks/results/fuzz.csv`.

    python tests/fuzz/run.py --cases 40 --first 5000 --out benchmarks/results/fuzz.csv
    python tests/fuzz/run.py --cases 2 --only config                               some of them

Each case runs in a fork of this process: the verb as the command line runs it, on files of which
one is changed by a seed that is the target's name and the case's number. A case is

    accepted     status 0: what was changed does not matter, or means something else
    refused      status 2 and one line on standard error, `safereg: ...`, of 520 characters at most
    traceback    anything else: a traceback, several lines, a crash, another status
    hang         more than 10 s of the processor, or 180 s of the clock (of a busy machine)
    outside      a file that is not in the folders that the command was given for its results
"""

# ruff: noqa: E402 - the environment and the path come before what they are for
import argparse
import csv
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import torch
from fuzz import mutations
from fuzz.mutations import Mutate
from support.builders import random_rows, save_model, tiny_model, write_jsonl
from support.said import without_asides

from safereg_dist.cli import main as safereg
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe

CPU_S, WALL_S = 10, 180
LONGEST_LINE = 520


class Target(NamedTuple):
    """What is changed, and the verb that reads it."""

    file: str
    """Below the case's folder; `{file}` in the arguments."""
    mutate: Mutate
    arguments: tuple[str, ...]
    base: str = "world"
    """The folder that a case is a copy of."""


DRY = ("train", "run.yaml", "--dry-run")
EVAL = ("eval", "--model", "model", "--max-new-tokens", "2", "--out", "out/eval.json")
PROMPTS = (*EVAL, "--prompts", "{file}")


def _template(content: bytes, chance: random.Random) -> bytes:
    """A chat template with a fragment that does harm."""
    fragment = chance.choice(
        (
            *("{{ 1/0 }}", "{{ x.y.z }}", "{{ 'x' * 10**10 }}", "{{ 9**(9**9) }}", "{% endfor %}"),
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% set n = namespace(s='x') %}{% for i in range(70) %}{% set n.s = n.s + n.s %}"
            "{% endfor %}{{ n.s }}",
            *(
                "{{ 'x' * 9000000 }}",
                "{{ '%999999999999s' % 1 }}",
                "{{ raise_exception('\x1b[2J') }}",
            ),
            *("{{ ''.__class__.__mro__ }}", "{{ (" * 300, "{% if 1 %}" * 300, "{% generation %}"),
            *(
                "{% include '/etc/passwd' %}",
                "{{ messages | tojson }}",
                "{{ strftime_now('%n' * 9) }}",
            ),
        )
    )
    at = chance.randrange(len(content) + 1)
    return content[:at] + fragment.encode() + content[at:]


TARGETS = {
    "config": Target("run.yaml", mutations.of_yaml, DRY),
    "override": Target("value", mutations.of_yaml, (*DRY, "{content}")),
    "sweep": Target("sweep.yaml", mutations.of_yaml, ("sweep", "{file}", "--list")),
    "train.jsonl": Target("train.jsonl", mutations.of_lines, DRY),
    "messages.jsonl": Target("messages.jsonl", mutations.of_lines, (*DRY, "data.train={file}")),
    "sharegpt.jsonl": Target("sharegpt.jsonl", mutations.of_lines, (*DRY, "data.train={file}")),
    "train.csv": Target("train.csv", mutations.of_bytes, (*DRY, "data.train={file}")),
    "audit": Target("train.jsonl", mutations.of_lines, ("audit", "run.yaml", "--show-text")),
    "reviewed rows": Target("reviewed.jsonl", mutations.of_lines, (*DRY, "risk.override={file}")),
    "prompts.jsonl": Target("prompts.jsonl", mutations.of_lines, PROMPTS),
    "tasks.jsonl": Target("tasks.jsonl", mutations.of_lines, PROMPTS),
    "model config.json": Target("model/config.json", mutations.of_either, DRY),
    "model config.json, eval": Target(
        "model/config.json", mutations.of_either, (*EVAL, "--prompts", "prompts.jsonl")
    ),
    "model config.json, plan": Target(
        "model/config.json",
        mutations.of_either,
        ("plan", "--model-config", "{file}", "--world-size", "2", "--gpu", "H100-SXM"),
    ),
    "model weights": Target("model/model.safetensors", mutations.of_bytes, DRY),
    "model index": Target(
        "sharded/model.safetensors.index.json", mutations.of_either, (*DRY, "model=sharded")
    ),
    "model tokenizer.json": Target("model/tokenizer.json", mutations.of_either, DRY),
    "model tokenizer_config.json": Target("model/tokenizer_config.json", mutations.of_either, DRY),
    "model generation_config.json": Target(
        "model/generation_config.json", mutations.of_either, (*EVAL, "--prompts", "prompts.jsonl")
    ),
    "chat template": Target("model/chat_template.jinja", _template, DRY),
    "chat template, eval": Target(
        "model/chat_template.jinja", _template, (*EVAL, "--prompts", "prompts.jsonl")
    ),
    "probe.json": Target("probe/probe.json", mutations.of_either, (*DRY, "risk.estimator=probe")),
    "probe tensors": Target(
        "probe/probe.safetensors", mutations.of_bytes, (*DRY, "risk.estimator=probe")
    ),
    "checkpoint state.json": Target(
        "out/checkpoint/step-00000002/state.json", mutations.of_either, ("train", "run.yaml"), "cut"
    ),
    "run config.yaml": Target("out/config.yaml", mutations.of_bytes, ("train", "run.yaml"), "cut"),
    "ledger.jsonl": Target(
        "out/ledger.jsonl", mutations.of_lines, ("ledger", "verify", "out"), "ran"
    ),
    "ledger summary": Target(
        "out/summary.json", mutations.of_either, ("ledger", "verify", "out"), "ran"
    ),
    **{
        f"report of {name}": Target(
            f"out/{name}", mutate, ("report", "out", "--model-card", "out/card.md"), "ran"
        )
        for name, mutate in {
            "metrics.jsonl": mutations.of_lines,
            "ledger.jsonl": mutations.of_lines,
            "summary.json": mutations.of_either,
            "eval.json": mutations.of_either,
            "config.yaml": mutations.of_bytes,
        }.items()
    },
}


def load() -> None:
    """Imports what the verbs import, so that forks do not; no thread may be left running."""
    for name in (
        *("datasets", "matplotlib.pyplot", "sklearn.feature_extraction.text", "scipy.stats"),
        *("sklearn.neighbors", "transformers.models.llama.modeling_llama", "tensorboard"),
        *("torch.utils.tensorboard", "torch._dynamo", "transformers.generation.utils"),
        *(f"safereg_dist.commands.{verb}" for verb in ("audit", "eval", "plan", "report", "sweep")),
        *("safereg_dist.commands.train", "safereg_dist.commands.ledger", "safereg_dist.factory"),
        *(
            "safereg_dist.evaluate.evaluate",
            "safereg_dist.evaluate.report",
            "safereg_dist.plan.verb",
        ),
        *("safereg_dist.run.gate", "safereg_dist.trainer", "safereg_dist.parallel.single"),
        *(
            "safereg_dist.factory.prepare",
            "safereg_dist.experiments.sweep",
            "safereg_dist.run.export",
        ),
    ):
        importlib.import_module(name)


def build(folder: Path) -> None:
    """The folders that cases are copies of: `world` (before a run), `cut` (killed), `ran`."""
    world = folder / "world"
    model = tiny_model()
    save_model(world / "model", model)
    save_model(world / "sharded", model)
    _shard(world / "sharded")
    rows = random_rows(6)
    write_jsonl(world / "train.jsonl", rows)
    turns = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "content": "w4", "tool_call_id": "a", "name": "f"},
        {"role": "assistant", "content": "w5", "train": True},
    ]  # fmt: skip
    plain = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2", "weight": 1}]
    write_jsonl(
        world / "messages.jsonl",
        [{"messages": plain, "risk": 0.1}, {"messages": turns[:1] + turns[3:], "risk": 1}] * 2,
    )
    share = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]
    write_jsonl(
        world / "sharegpt.jsonl", [{"conversations": share, "risk": 0.9, "tools": None}] * 1
    )
    with (world / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "response", "risk"])
        writer.writeheader()
        writer.writerows(rows)
    write_jsonl(
        world / "reviewed.jsonl",
        [{"id": row["id"], "action": "allow", "reason": "read"} for row in rows[:3]],
    )
    asked = [
        {"id": "p1", "prompt": "w1 w2", "label": "harmful", "response": "w3", "complying": "w4"},
        {
            "messages": [{"role": "user", "content": "w5"}],
            "label": "benign",
            "type": "t",
            "pair": "1",
        },
        {"Goal": "w6", "Index": 1, "Category": "c", "Target": "w7", "label": "harmful"},
    ]
    write_jsonl(world / "prompts.jsonl", asked)
    tasks = [
        {
            "prompt": "w1",
            "label": "task",
            "response": "w2",
            "measure": "rouge_l",
            "responses": ["w2"],
        },
        {"question": "w1", "choices": ["w2", "w3"], "answer": 1},
        {"question": "w1", "choices": {"text": ["w2"], "label": ["A"]}, "answerKey": "A"},
        {"question": "w1", "context": "w4", "answers": {"text": ["w2"]}},
        {"question": "w1", "answer": "w2 #### 7"},
    ]
    write_jsonl(world / "tasks.jsonl", tasks)
    Probe(
        layer=2,
        pooling="last_prompt_token",
        mean=torch.zeros(32),
        scale=torch.ones(32),
        weight=torch.ones(32),
        bias=0.0,
        threshold=0.5,
        fingerprint=model_fingerprint(model),
    ).save(world / "probe")
    config = {
        "model": "model",
        "reference": {"model": None, "offload": "none"},
        "data": {"train": "train.jsonl", "max_length": 64, "anchor_fraction": 0.05},
        "risk": {"estimator": "column", "max_held_back": 1.0, "path": "probe"},
        "regularizer": {"objective": "convex", "schedule": "step", "floor": 0.0},
        "optimizer": {"lr": 1e-5, "warmup_ratio": 0.0},
        "train": {"steps": 3, "precision": "fp32", "micro_batch_size": 2, "save_every": 1},
        "engine": {"name": "single", "timeout_s": 60.0},
        "output_dir": "out",
    }
    (world / "run.yaml").write_text(json.dumps(config))
    (world / "value").write_text(json.dumps({"train": {"steps": 3}, "risk": {"path": "x"}}))
    axes = {"seed": {"0": ["train.seed=0"], "1": ["train.seed=1"]}}
    sweep = {"config": "run.yaml", "out": "out", "axes": axes, "arms": {"a": ["train.steps=2"]}}
    sweep |= {"evaluation": {"prompts": ["prompts.jsonl"], "max_new_tokens": 2}}
    (world / "sweep.yaml").write_text(json.dumps(sweep))
    # A run keeps the paths of what it read: it runs where its cases do.
    shutil.copytree(world, folder / "case")
    run = Case(folder / "case", folder / "log")
    ended = run.ends(("train", "run.yaml", "train.keep_checkpoints=3"), seconds=100)
    assert ended == "accepted", (folder / "log").read_text()
    ended = run.ends((*EVAL, "--prompts", "prompts.jsonl"), seconds=100)
    assert ended == "accepted", (folder / "log").read_text()
    (folder / "case").rename(folder / "ran")
    shutil.copytree(folder / "ran", folder / "cut")
    for name in ("summary.json", "report.html"):
        (folder / "cut" / "out" / name).unlink(missing_ok=True)
    for name, target in TARGETS.items():
        if "{content}" not in target.arguments:
            _, ended, printed = next(cases(name, 1, folder, mutate=lambda content, _: content))
            assert ended == "accepted", f"{name}: {printed}"


def _shard(folder: Path) -> None:
    """Weights in two files with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts, weight_map = ({}, {}), {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        parts[number % 2][name] = tensor
        weight_map[name] = f"model-{number % 2}.safetensors"
    for number, part in enumerate(parts):
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Case(NamedTuple):
    """A folder to run verbs in, and the file that they print to."""

    folder: Path
    log: Path

    def ends(self, arguments: tuple[str, ...], *, seconds: float = CPU_S) -> str:
        """How the verb ends, without a look at files."""
        pid = os.fork()
        if pid == 0:
            self._become(arguments, seconds)
        end = time.monotonic() + max(WALL_S, seconds)
        status: int | None = None
        while status is None and time.monotonic() < end:
            found, how = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(how) if found else None
            time.sleep(0.002)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if status is None or status == -signal.SIGXCPU:
            return "hang"
        return self._judged(status)

    def _judged(self, status: int) -> str:
        text = self.log.with_suffix(".err").read_text(errors="replace")
        if status == 0:
            return "traceback" if "Traceback" in text else "accepted"
        said = without_asides(text)
        is_line = len(said) == 1 and said[0].startswith("safereg: ") and said[0].isprintable()
        is_usage = bool(said) and said[0].startswith("usage: ")
        short = bool(said) and len(said[-1]) <= LONGEST_LINE
        return "refused" if status == 2 and short and (is_line or is_usage) else "traceback"

    def _become(self, arguments: tuple[str, ...], seconds: float) -> None:
        """The child: the verb, and its end."""
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(self.log, flags), 1)
            os.dup2(os.open(self.log.with_suffix(".err"), flags), 2)
            os.chdir(self.folder)
            for name in ("home", "tmp"):
                (self.folder / name).mkdir(exist_ok=True)
            os.environ |= {
                "HOME": str(self.folder / "home"),
                "TMPDIR": str(self.folder / "tmp"),
                "SAFEREG_CACHE": str(self.folder / "cache"),
            }
            tempfile.tempdir = str(self.folder / "tmp")
            status = safereg(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def cases(
    name: str, count: int, root: Path, *, first: int = 0, mutate: Mutate | None = None
) -> Iterator[tuple[int, str, str]]:
    """(number, how it ended, what it printed) of each case of a target."""
    target = TARGETS[name]
    mutate = mutate or target.mutate
    for number in range(first, first + count):
        chance = random.Random(f"{name} {number}")
        folder = root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / target.base, folder)
        file = folder / target.file
        file.write_bytes(mutate(file.read_bytes(), chance))
        arguments = tuple(_filled(each, target, file, chance) for each in target.arguments)
        before = _files(folder)
        case = Case(folder, root / "log")
        ended = case.ends(arguments)
        printed = case.log.read_text(errors="replace")
        printed += case.log.with_suffix(".err").read_text(errors="replace")
        new = _files(folder) - before
        lost = sorted(f for f in new if f.split("/")[0] not in ("out", "out.audit", "cache"))
        if lost:
            ended, printed = "outside", f"{lost}\n{printed}"
        yield number, ended, printed


def _filled(argument: str, target: Target, file: Path, chance: random.Random) -> str:
    if argument == "{content}":  # an override of one of the keys
        key = chance.choice(
            ("train.steps", "data.train", "risk", "model", "a.b", "", "train.steps.x")
        )
        nasty = chance.choice([*mutations.YAML_NASTY, *map(str, mutations.NASTY)])
        text = nasty.removeprefix(mutations.RAW).replace("\x00", "")[:100_000]
        return f"{key}={text}".encode("utf-8", "replace").decode()
    return argument.replace("{file}", target.file)


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def main() -> int:
    """Runs the cases and writes the table; 1 where a case ended badly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300, help="of each target")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", action="append", choices=[*TARGETS])
    parser.add_argument("--out", type=Path, help="the table, CSV")
    arguments = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = Path(folder)
        load()
        build(root)
        rows = []
        for name in arguments.only or TARGETS:
            ends: Counter[str] = Counter()
            started = time.monotonic()
            for number, ended, printed in cases(name, arguments.cases, root, first=arguments.first):
                ends[ended] += 1
                if ended not in ("refused", "accepted"):
                    bad += 1
                    print(f"== {name} {number}: {ended}\n{printed[-1500:]}", flush=True)
            seconds = time.monotonic() - started
            counts = {each: ends[each] for each in ("refused", "accepted")}
            rows.append(
                {"target": name, "tried": arguments.cases, **counts,
                 "tracebacks": ends["traceback"], "hangs": ends["hang"], "outside": ends["outside"]}
            )  # fmt: skip
            print(f"{name}: {dict(ends)} in {seconds:.0f} s", flush=True)
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
