"""The risk of every row of a data file, ahead of time: training then reads it as a column.

The rows come out in their order with all their fields, with `risk`, and with `risk_failed: true`
where the judge failed. Judgements are cached as they arrive: repeating the command resumes a killed
run, and requests only the failed judgements of a finished one.

Of an indexed data set (Megatron's PREFIX.idx and PREFIX.bin) the risks of its sequences come out as
an array beside it (`data.indexed`). A sequence is judged as an answer to nothing, in pieces; the
largest risk of a piece is its own.
"""

import argparse
import json
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safereg_dist.commands.options import add_json, add_quiet, at_least, example
from safereg_dist.commands.outcome import Outcome, command
from safereg_dist.config import CriticConfig, section_from_dict
from safereg_dist.critic.critic import build_critic, score_conversations
from safereg_dist.critic.verdict import Messages, Verdict
from safereg_dist.data.files import read_rows
from safereg_dist.data.formats import conversation_of
from safereg_dist.data.indexed import IndexedTokens, prefix_of, write_risks
from safereg_dist.errors import ConfigError, CriticUnavailable, DataError, printable
from safereg_dist.screen.histogram import by_tenth
from safereg_dist.screen.table import table
from safereg_dist.storage.atomic import whole_file


class Scored(NamedTuple):
    """What was found, in short."""

    rows: int
    failures: Counter[str]
    """Reason -> rows whose judgement failed."""
    by_risk: dict[str, int]
    """Tenth of the risk -> rows."""

    def figures(self) -> dict[str, Any]:
        """For `--json`."""
        failed = {"failed": self.failures.total(), "failed_by_reason": dict(self.failures)}
        return {"rows": self.rows, **failed, "rows_by_risk": self.by_risk}


def score_with_critic(
    settings: CriticConfig, data: Path, out: Path, *, progress: bool = True
) -> Scored:
    """Scores with a judge model and writes `out`; what came of it, which is printed.

    Raises:
        ConfigError, CriticUnavailable: no such judge; or, under `stop`, a judgement failed.
        DataError: a row that is no conversation; all rows are read before the first is judged.
        CheckpointError: `out` or the cache cannot be written.
    """
    count = sum(1 for _ in _conversations(data))
    critic = build_critic(settings)
    try:
        verdicts = score_conversations(
            critic,
            (messages for _, messages in _conversations(data)),
            progress=progress,
            description=f"score {data.name}",
            total=count,
        )
        scored = _write(out, data, _refusing_if_all_fail(verdicts))
    finally:
        critic.close()
    _print(scored, settings.fail, out)
    return scored


def score_with_probe(
    probe: Path, model: Path, data: Path, out: Path, *, progress: bool = True
) -> Scored:
    """Scores with a fitted probe on the model's hidden states; else as `score_with_critic`.

    Raises:
        ProbeError, ConfigError: the probe or the model does not load, or they do not belong
            together.
        DataError, CheckpointError: as `score_with_critic`.
    """
    from safereg_dist.probe_lab.apply import score_rows

    rows = [row | {"risk": None} for row, _ in _conversations(data)]
    risks = score_rows(probe, model, rows, progress=progress)
    scored = _write(out, data, (Verdict(risk) for risk in risks))
    _print(scored, "closed", out)
    return scored


class Indexed(NamedTuple):
    """An indexed data set to score."""

    data: IndexedTokens
    stem: Path
    """The files stem.risk.npy and stem.risk.json are written."""
    tokenizer: str
    """Folder or name of the one that the data was made with."""
    piece_tokens: int
    """Tokens of a sequence that are judged at once."""


Piece = tuple[list[int], str]
"""Tokens, and their text."""
Judge = Callable[[Iterator[Piece], int], Iterable[Verdict]]
"""(pieces, how many there are at most) -> a verdict for each, in order."""


def score_indexed(job: Indexed, judge: Judge, *, scorer: str, fail: str = "closed") -> Scored:
    """Scores the sequences of an indexed data set and writes their risks, [N] float64.

    `scorer` says what they depend on besides the data, and is written beside them.

    Raises:
        ConfigError: there is no tokenizer.
        DataError: a token that the tokenizer does not have.
        CheckpointError: the files cannot be written; and the judge's errors.
    """
    from safereg_dist.data.tokenized import read_tokenizer

    data, reader = job.data, read_tokenizer(job.tokenizer)
    risks, failures = np.zeros(len(data)), Counter[str]()
    asked: deque[int] = deque()

    def pieces() -> Iterator[Piece]:
        for index, tokens in data.pieces(job.piece_tokens, vocab_size=len(reader)):
            text = str(reader.decode(tokens, skip_special_tokens=True))
            if text.strip():  # of a sequence without any the risk is 0
                asked.append(index)
                yield tokens, text

    at_most = int(-(-data.lengths // job.piece_tokens).sum(dtype=np.int64))
    for verdict in judge(pieces(), at_most):
        index = asked.popleft()
        risks[index] = max(risks[index], verdict.score)
        failures.update([verdict.reason or "unknown"] if verdict.failed else [])
    facts = {"scorer": scorer, "piece_tokens": job.piece_tokens, "failed": dict(failures)}
    out = write_risks(data, risks, facts, job.stem)
    scored = Scored(len(data), failures, by_tenth(risks))
    _print(scored, fail, out, what="sequences")
    return scored


def _score_indexed_with_critic(settings: CriticConfig, job: Indexed) -> Scored:
    critic = build_critic(settings)

    def judge(pieces: Iterator[Piece], at_most: int) -> Iterator[Verdict]:
        texts = ([{"role": "assistant", "content": text}] for _, text in pieces)
        name = f"score {Path(job.data.prefix).name}"
        return score_conversations(critic, texts, progress=True, description=name, total=at_most)

    try:
        return score_indexed(job, judge, scorer=critic.identity, fail=settings.fail)
    finally:
        critic.close()


def _score_indexed_with_probe(probe: Path, model: Path, job: Indexed) -> Scored:
    from safereg_dist.probe_lab.apply import score_texts
    from safereg_dist.risk.probe import load_probes

    def judge(pieces: Iterator[Piece], at_most: int) -> Iterator[Verdict]:
        tokens = (tokens for tokens, _ in pieces)
        return (Verdict(risk) for risk in score_texts(probe, model, tokens, total=at_most))

    identity = " ".join(["probe", *(known.identity for known in load_probes(probe))])
    return score_indexed(job, judge, scorer=identity)


def _conversations(data: Path) -> Iterator[tuple[dict, Messages]]:
    """Each row of the file, and its conversation as a judge reads it, with an assistant turn."""
    is_empty = True
    for where, row in read_rows(data):
        yield row, conversation_of(row, where).as_text()
        is_empty = False
    if is_empty:
        raise DataError(f"{data} holds no row: give at least one")


def _write(out: Path, data: Path, verdicts: Iterable[Verdict]) -> Scored:
    """Writes the rows with their verdicts. Says what it replaces."""
    failures: Counter[str] = Counter()
    risks, replaced = array("d"), 0
    with whole_file(out) as file:
        for (_, row), verdict in zip(read_rows(data), verdicts, strict=True):
            replaced += row.get("risk") is not None
            row = {k: v for k, v in row.items() if k != "risk_failed"} | {"risk": verdict.score}
            risks.append(verdict.score)
            if verdict.failed:
                row["risk_failed"] = True
                failures[verdict.reason or "unknown"] += 1
            file.write((json.dumps(row) + "\n").encode())
    if replaced:
        print(f"score: {replaced} rows had a risk of their own, which the new one replaces")
    return Scored(len(risks), failures, by_tenth(risks))


_HOPELESS = 64
"""So many failures from the first row on, without a verdict between, are the judge's fault."""


def _refusing_if_all_fail(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """The verdicts.

    Raises:
        CriticUnavailable: the first `_HOPELESS` failed, all of them.
    """
    failures: Counter[str] = Counter()
    has_judged = False
    for verdict in verdicts:
        has_judged = has_judged or not verdict.failed
        if not has_judged:
            failures[verdict.reason or "unknown"] += 1
            if failures.total() == _HOPELESS:
                raise CriticUnavailable(
                    f"the judge failed at each of the first {_HOPELESS} rows "
                    f"({_reasons(failures)}), so it would at the rest, and nothing is written: "
                    f"{_REMEDY[_is_slow(failures)]}"
                )
        yield verdict


def _reasons(failures: Counter[str]) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in failures.most_common(4))


def _is_slow(failures: Counter[str]) -> bool:
    return any(word in reason for reason in failures for word in _TOO_LATE)


_REMEDY = {
    True: "give a longer --timeout-s or a lower --concurrency",
    False: "check that --format is the one that this judge was trained for",
}
_TOO_LATE = ("no answer within", "no time left")


def _print(scored: Scored, fail: str, out: Path, *, what: str = "rows") -> None:
    rows = [
        (tenth, count, f"{count / max(scored.rows, 1):.1%}")
        for tenth, count in scored.by_risk.items()
    ]
    print(table("Risk", ("", what, "share"), rows))
    count, failed = scored.rows, scored.failures.total()
    if not failed:
        print(f"score: {count} {what}, 0 failed judgements, written to {printable(out)}")
        return
    meaning = "risk 1" if fail == "closed" else "risk 0"
    how = f", {_REMEDY[True]}" if _is_slow(scored.failures) else ""
    print(
        f"score: {count} {what}, {failed} failed judgements that count as {meaning} "
        f"({_reasons(scored.failures)}); the same command asks for those again{how}; written to "
        f"{printable(out)}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example(
        "safereg score --probe runs/probe --model-path MODEL --data rows.jsonl --out scored.jsonl",
        "safereg score --endpoint http://127.0.0.1:8000/v1 --model NAME --format llama_guard "
        "--data rows.jsonl --out scored.jsonl",
    )
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible server")
    judge.add_argument("--local", metavar="DIR", help="folder of a classifier or a guard")
    judge.add_argument("--probe", type=Path, metavar="DIR", help="written by `safereg probe fit`")
    parser.add_argument("--model", metavar="NAME", help="the judge's name at the endpoint")
    parser.add_argument(
        "--format",
        help="how the judge is asked: qwen3guard, llama_guard, wildguard, shieldgemma, "
        "gpt_oss_safeguard, harmbench or rubric",
    )
    parser.add_argument("--model-path", type=Path, metavar="DIR", help="the model the probe reads")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="rows as for training, or PREFIX of Megatron's PREFIX.idx and PREFIX.bin",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the rows with their risk; required (default: PREFIX, of an indexed data set)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="that an indexed data set was made with (default: --model-path)",
    )
    parser.add_argument(
        "--piece-tokens",
        type=at_least(1),
        default=2048,
        help="tokens of an indexed data set's sequence that are judged at once",
    )
    parser.add_argument(
        "--fail",
        choices=("closed", "open", "stop"),
        default="closed",
        help="what a failed judgement means: risk 1, risk 0, or the end of the verb",
    )
    parser.add_argument(
        "--concurrency", type=at_least(1), default=16, help="judgements in flight at a time"
    )
    parser.add_argument("--timeout-s", type=float, default=30.0, help="seconds for one judgement")
    parser.add_argument("--allow-plain-http", action="store_true", help="send the key over http")
    parser.add_argument(
        "--cache",
        metavar="FILE",
        help="SQLite file of known scores; `none` for no cache (default: below $SAFEREG_CACHE)",
    )
    add_json(parser)
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Writes the data with a risk in every row, or the risks of an indexed data set."""
    if arguments.probe is not None and arguments.model_path is None:
        raise ConfigError("--probe needs --model-path, the model whose states it reads")
    job = _indexed(arguments)
    if job is None and arguments.out is None:
        raise ConfigError(
            f"--out is missing: name the file that the rows of {arguments.data} go to with their "
            f"risk (only of an indexed data set, with {arguments.data}.idx, there is a default)"
        )
    if arguments.endpoint is not None and not (arguments.model and arguments.format):
        raise ConfigError(
            "--endpoint needs --model NAME and --format too: the judge's name there, and how it is "
            "asked (llama_guard, ...; see --help)"
        )
    out = arguments.out if job is None else job.stem
    if arguments.probe is not None:
        own = (arguments.probe, arguments.model_path)
        if job is None:
            scored = score_with_probe(*own, arguments.data, out)
        else:
            scored = _score_indexed_with_probe(*own, job)
    else:
        same = "endpoint model format local fail concurrency timeout_s cache allow_plain_http"
        given = {name: getattr(arguments, name) for name in same.split()}
        settings = section_from_dict(CriticConfig, given, "risk.critic")
        if job is None:
            scored = score_with_critic(settings, arguments.data, out)
        else:
            scored = _score_indexed_with_critic(settings, job)
    if job is not None:
        return Outcome(figures={**scored.figures(), "out": out})
    is_usable = 2 * scored.failures.total() <= scored.rows  # else first the same command again
    next_step = ("train", "CONFIG.yaml", f"data.train={out}", "risk.estimator=column")
    now = command(*next_step) if is_usable else ""
    return Outcome(figures={**scored.figures(), "out": out}, now=now)


def _indexed(arguments: argparse.Namespace) -> Indexed | None:
    """What to score if --data names an indexed data set."""
    prefix = prefix_of(arguments.data)
    if prefix is None:
        return None
    tokenizer = arguments.tokenizer or arguments.model_path
    if tokenizer is None:
        raise ConfigError(f"{prefix} holds tokens: give --tokenizer, with which it was made")
    stem, piece_tokens = arguments.out or prefix, arguments.piece_tokens
    return Indexed(IndexedTokens(prefix), stem, str(tokenizer), piece_tokens)
