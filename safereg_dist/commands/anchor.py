"""Anchor rows: greedy answers of the reference, made once before training.

During training these rows carry the divergence only, so they hold the policy to what the reference
says to harmful and to benign prompts alike. The work is dealt to ranks by
prompts[rank::world_size]; each rank writes `<out>.rank{r}`, and `merge_anchor_parts` joins them in
input order, so the file is the same for any number of ranks. Collectives: none; with several ranks
the caller puts a barrier between `build_anchors` (all ranks) and `merge_anchor_parts` (one rank).
"""

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from safereg_dist.commands.options import (
    add_action,
    add_endpoint,
    add_json,
    add_local_rank,
    add_quiet,
    at_least,
    example,
)
from safereg_dist.commands.outcome import Outcome, command
from safereg_dist.data.files import LabelledPrompt, read_prompts
from safereg_dist.errors import CheckpointError, ConfigError, DataError, GroupError, printable
from safereg_dist.evaluate.generate import generate_answers, load_model
from safereg_dist.evaluate.judges import KeywordJudge
from safereg_dist.evaluate.respondent import Asked, Endpoint
from safereg_dist.parallel.distributed import distributed_ranks
from safereg_dist.screen.progress import say
from safereg_dist.screen.table import table
from safereg_dist.storage.atomic import write_atomically

_SENTENCE_END = re.compile(r"""(?<![\d.])[.!?]["')\]]*(?=\s|$)|[。！？]""")  # noqa: RUF001
"""The end of a sentence; not of a list's number, or of dots that leave something out."""


def build_anchors(
    model_dir: Path | str,
    prompt_files: list[Path],
    out: Path,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    endpoint: Endpoint | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Answers this rank's prompts and writes its part; a single process also merges it into `out`.

    Returns the counts `prompts`, `rows`, `shortened`, `dropped_empty` and `dropped_cut`, and of the
    rows whose prompt is labelled harmful `harmful_rows` and, by the keyword judge, `refusals`: of
    this rank, or of all where `world_size` is 1. The policy must not be taught to say nothing or to
    stop in mid-sentence: an answer that `max_new_tokens` cut off is shortened to its last whole
    sentence, and one that is empty, or cut off before a sentence ended, makes no row. An `endpoint`
    answers in place of the model's folder, asked by one process.

    Raises:
        ConfigError: the model cannot be loaded or has no chat template; several processes and an
            endpoint.
        EndpointError: see `Endpoint`.
        DataError: a prompt file is missing or malformed, or (single process) no answer was usable.
        GroupError: `rank` is outside [0, world_size).
        CheckpointError: the part cannot be written.
    """
    if not 0 <= rank < world_size:
        raise GroupError(
            f"expected 0 <= rank < world_size, got rank {rank} of {world_size}: pass the launcher's"
        )
    if endpoint is not None and world_size > 1:
        raise ConfigError(
            f"an endpoint is asked by one process, got {world_size}: start this without a launcher"
        )
    if not prompt_files:
        raise ConfigError("expected one prompt file or more, got none: give the prompts to answer")
    prompts = [prompt for file in prompt_files for prompt in read_prompts(file)]
    mine = range(rank, len(prompts), world_size)
    shown = progress and rank == 0
    own = [prompts[index] for index in mine]
    name = "anchor answers"
    if endpoint is not None:
        found = dict(endpoint.answers_and_ends(own, Asked(name)))
        answers = [found[place] for place in range(len(own))]
    else:
        model, tokenizer = load_model(model_dir, dtype=dtype, device=device, progress=shown)
        how = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        written = generate_answers(model, tokenizer, own, progress=shown, description=name, **how)
        answers = [(answer.text, answer.finished) for answer in written]
    header = {
        "model": str(model_dir),
        "prompts": len(prompts),
        "prompts_sha256": _digest(prompts),
        "max_new_tokens": max_new_tokens,
        "world_size": world_size,
    }
    rows = [
        _row(index, prompts[index], *answer) for index, answer in zip(mine, answers, strict=True)
    ]
    _write_lines(_part(Path(out), rank), [header, *rows])
    if world_size == 1:
        return merge_anchor_parts(out, 1)
    return _counts(rows)


def merge_anchor_parts(out: Path, world_size: int) -> dict[str, Any]:
    """Joins the parts of all ranks into `out` in input order, removes them, and prints the counts.

    Returns the counts that `build_anchors` does.

    Raises:
        CheckpointError: a part is missing, or the parts come from different runs.
        DataError: no answer was usable.
    """
    out = Path(out)
    headers, rows = [], []
    for rank in range(world_size):
        header, *part = _read_lines(_part(out, rank))
        headers.append(header)
        rows.extend(part)
    rows.sort(key=lambda row: row["index"])
    complete = [row["index"] for row in rows] == list(range(headers[0]["prompts"]))
    if not complete or any(header != headers[0] for header in headers):
        raise CheckpointError(
            f"the {world_size} parts beside {out} do not belong together (other model, prompts or "
            "number of ranks): delete them and build the anchors again on all ranks"
        )
    counts = _counts(rows)
    kept = [{"id": row["id"], "messages": row["messages"]} for row in rows if "messages" in row]
    if kept:
        _write_lines(out, kept)
    for rank in range(world_size):
        _part(out, rank).unlink()
    if not kept:
        raise DataError(
            f"none of {counts['prompts']} answers is usable ({counts['dropped_empty']} empty, "
            f"{counts['dropped_cut']} cut at {headers[0]['max_new_tokens']} tokens): raise "
            "max_new_tokens, or give a reference that answers"
        )
    print(table("Answers", ("", "prompts"), _named(counts, headers[0]["max_new_tokens"])))
    if 2 * counts["refusals"] < counts["harmful_rows"]:
        say(
            f"warning: by its first words this model refuses {counts['refusals']} of "
            f"{counts['harmful_rows']} prompts labelled harmful: it answers what anchors should "
            "refuse, so they keep little; take a model that refuses"
        )
    print(
        f"anchors: {counts['rows']} rows from {counts['prompts']} prompts answered by "
        f"{printable(headers[0]['model'])}, written to {printable(out)}"
    )
    return counts


def _named(counts: dict[str, int], most: int) -> list[tuple[str, int]]:
    """The counts for people; the first two are rows, those dropped are not."""
    whole, harmful = counts["rows"] - counts["shortened"], counts["harmful_rows"]
    refused = [(f"refusals, of {harmful} rows labelled harmful", counts["refusals"])]
    return [
        (f"whole within {most} tokens", whole),
        ("shortened to whole sentences", counts["shortened"]),
        ("dropped: empty", counts["dropped_empty"]),
        ("dropped: no whole sentence", counts["dropped_cut"]),
        *(refused if harmful else []),
    ]


def _row(index: int, prompt: LabelledPrompt, answer: str, is_finished: bool) -> dict[str, Any]:
    """A line of a part file: an anchor row with its place, or why there is none."""
    if not answer:
        return {"index": index, "dropped": "empty"}
    text = answer if is_finished else whole_sentences(answer)
    if not text:
        return {"index": index, "dropped": "cut"}
    is_harmful = prompt.label == "harmful"
    return {
        "index": index,
        "shortened": not is_finished,
        "is_harmful": is_harmful,
        "is_refusal": is_harmful and KeywordJudge().is_refusal(prompt, text),
        # The place makes the id unique: prompt files may number their rows alike.
        "id": f"anchor-{index}-{prompt.id}",
        "messages": [*prompt.messages, {"role": "assistant", "content": text}],
    }


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; empty without one.

    >>> whole_sentences("Take 3.5 m of it. Then")
    'Take 3.5 m of it.'
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    dropped = [row.get("dropped") for row in rows]
    return {
        "prompts": len(rows),
        "rows": dropped.count(None),
        "shortened": sum(row.get("shortened", False) for row in rows),
        "dropped_empty": dropped.count("empty"),
        "dropped_cut": dropped.count("cut"),
        "harmful_rows": sum(row.get("is_harmful", False) for row in rows),
        "refusals": sum(row.get("is_refusal", False) for row in rows),
    }


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.rank{rank}")


def _digest(prompts: list[LabelledPrompt]) -> str:
    text = json.dumps([[prompt.id, prompt.messages] for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(
            f"expected a part at {path}, found none: run build_anchors on every rank, then a "
            "barrier, then merge with the same world_size"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its actions and their options."""
    shows = "safereg anchor build --model MODEL --prompts prompts.jsonl --out runs/anchor.jsonl"
    parser.epilog = example(shows)
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    build = add_action(
        actions, "build", "greedy answers of the reference to prompts, as rows", shows=shows
    )
    build.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="the model before training; of --endpoint its name there",
    )
    build.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="harmful and benign ones, as for `safereg eval`; labels are not needed, by them "
        "refusals are counted",
    )
    build.add_argument(
        "--out", type=Path, required=True, metavar="FILE.jsonl", help="the rows, for data.anchor"
    )
    build.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        default=128,
        help="tokens of an answer; a longer one is shortened to whole sentences",
    )
    build.add_argument(
        "--batch-size", type=at_least(1), default=32, help="prompts that are answered at once"
    )
    add_endpoint(build)
    add_json(build)
    add_quiet(build)
    add_local_rank(build)


def run(arguments: argparse.Namespace) -> Outcome:
    """Greedy answers of the reference, sharded over the ranks of the launcher."""
    with distributed_ranks() as ranks:
        with ranks.together():
            endpoint = None
            if arguments.endpoint is not None:
                endpoint = Endpoint(
                    arguments.endpoint,
                    str(arguments.model),
                    max_new_tokens=arguments.max_new_tokens,
                    api_key_env=arguments.api_key_env,
                    allow_plain_http=arguments.allow_plain_http,
                    progress=ranks.is_main,
                )
            counts = build_anchors(
                arguments.model,
                arguments.prompts,
                arguments.out,
                max_new_tokens=arguments.max_new_tokens,
                batch_size=arguments.batch_size,
                rank=ranks.rank,
                world_size=ranks.world_size,
                progress=ranks.is_main,
                device=ranks.device,
                endpoint=endpoint,
            )
        with ranks.together():
            if ranks.world_size > 1 and ranks.is_main:
                counts = merge_anchor_parts(arguments.out, ranks.world_size)
        if not ranks.is_main:
            return Outcome()
    return Outcome(
        figures={**counts, "model": arguments.model, "out": arguments.out},
        now=command("audit", "CONFIG.yaml", f"data.anchor={arguments.out}"),
    )
