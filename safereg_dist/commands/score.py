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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from safereg_dist.commands.options import at_least
from safereg_dist.config import CriticConfig, section_from_dict
from safereg_dist.critic.critic import build_critic, score_conversations
from safereg_dist.critic.verdict import Messages, Verdict
from safereg_dist.data.files import read_rows
from safereg_dist.data.formats import conversation_of
from safereg_dist.data.indexed import IndexedTokens, prefix_of, write_risks
from safereg_dist.errors import ConfigError, DataError, printable
from safereg_dist.storage.atomic import whole_file


def score_with_critic(
    settings: CriticConfig, data: Path, out: Path, *, progress: bool = True
) -> Counter[str]:
    """Scores with a judge model and writes `out`; how many rows failed, by reason.

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
        failures = _write(out, data, verdicts)
    finally:
        critic.close()
    print(_summary(count, failures, settings.fail, out))
    return failures


def score_with_probe(
    probe: Path, model: Path, data: Path, out: Path, *, progress: bool = True
) -> None:
    """Scores with a fitted probe on the model's hidden states and writes `out`.

    Raises:
        ProbeError, ConfigError: the probe or the model does not load, or they do not belong
            together.
        DataError, CheckpointError: as `score_with_critic`.
    """
    from safereg_dist.probe_lab.apply import score_rows

    rows = [row | {"risk": None} for row, _ in _conversations(data)]
    risks = score_rows(probe, model, rows, progress=progress)
    _write(out, data, (Verdict(risk) for risk in risks))
    print(_summary(len(rows), Counter(), "closed", out))


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


def score_indexed(job: Indexed, judge: Judge, *, scorer: str, fail: str = "closed") -> np.ndarray:
    """Scores an indexed data set and writes the risks; these, [N] float64 of its N sequences.

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
    print(_summary(len(data), failures, fail, out, what="sequences"))
    return risks


def _score_indexed_with_critic(settings: CriticConfig, job: Indexed) -> None:
    critic = build_critic(settings)

    def judge(pieces: Iterator[Piece], at_most: int) -> Iterator[Verdict]:
        texts = ([{"role": "assistant", "content": text}] for _, text in pieces)
        name = f"score {Path(job.data.prefix).name}"
        return score_conversations(critic, texts, progress=True, description=name, total=at_most)

    try:
        score_indexed(job, judge, scorer=critic.identity, fail=settings.fail)
    finally:
        critic.close()


def _score_indexed_with_probe(probe: Path, model: Path, job: Indexed) -> None:
    from safereg_dist.probe_lab.apply import score_texts
    from safereg_dist.risk.probe import load_probes

    def judge(pieces: Iterator[Piece], at_most: int) -> Iterator[Verdict]:
        tokens = (tokens for tokens, _ in pieces)
        return (Verdict(risk) for risk in score_texts(probe, model, tokens, total=at_most))

    identity = " ".join(["probe", *(known.identity for known in load_probes(probe))])
    score_indexed(job, judge, scorer=identity)


def _conversations(data: Path) -> Iterator[tuple[dict, Messages]]:
    """Each row of the file, and its conversation as a judge reads it, with an assistant turn."""
    is_empty = True
    for where, row in read_rows(data):
        yield row, conversation_of(row, where).as_text()
        is_empty = False
    if is_empty:
        raise DataError(f"{data} holds no row: give at least one")


def _write(out: Path, data: Path, verdicts: Iterable[Verdict]) -> Counter[str]:
    """Writes the rows with their verdicts; how many failed, by reason. Says what it replaces."""
    failures: Counter[str] = Counter()
    replaced = 0
    with whole_file(out) as file:
        for (_, row), verdict in zip(read_rows(data), verdicts, strict=True):
            replaced += row.get("risk") is not None
            row = {k: v for k, v in row.items() if k != "risk_failed"} | {"risk": verdict.score}
            if verdict.failed:
                row["risk_failed"] = True
                failures[verdict.reason or "unknown"] += 1
            file.write((json.dumps(row) + "\n").encode())
    if replaced:
        print(f"score: {replaced} rows had a risk of their own, which the new one replaces")
    return failures


def _summary(
    count: int, failures: Counter[str], fail: str, out: Path, *, what: str = "rows"
) -> str:
    failed = failures.total()
    if not failed:
        return f"score: {count} {what}, 0 failed judgements, written to {printable(out)}"
    reasons = ", ".join(f"{number} x {reason}" for reason, number in failures.most_common(4))
    meaning = "risk 1" if fail == "closed" else "risk 0"
    return (
        f"score: {count} {what}, {failed} failed judgements that count as {meaning} ({reasons}); "
        f"the same command asks for those again; written to {printable(out)}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible server")
    judge.add_argument("--local", metavar="MODEL", help="folder of a classifier or a guard")
    judge.add_argument("--probe", type=Path, metavar="DIR", help="written by `safereg probe fit`")
    parser.add_argument("--model", metavar="NAME", help="the judge's name at the endpoint")
    parser.add_argument("--format", help="how the judge is asked, e.g. llama_guard")
    parser.add_argument("--model-path", type=Path, metavar="M", help="the model the probe reads")
    parser.add_argument("--data", type=Path, required=True, help="rows, or PREFIX of an index")
    parser.add_argument("--out", type=Path, help="of an indexed data set by default PREFIX")
    parser.add_argument("--tokenizer", metavar="T", help="that an indexed data set was made with")
    parser.add_argument(
        "--piece-tokens", type=at_least(1), default=2048, help="of a sequence judged at once"
    )
    parser.add_argument("--fail", choices=("closed", "open", "stop"), default="closed")
    parser.add_argument("--concurrency", type=at_least(1), default=16)
    parser.add_argument("--timeout-s", type=float, default=30.0, help="of one judgement")
    parser.add_argument("--allow-plain-http", action="store_true", help="send the key over http")
    parser.add_argument("--cache", metavar="FILE", help="of known scores; `none` for no cache")


def run(arguments: argparse.Namespace) -> int:
    """Writes the data with a risk in every row, or the risks of an indexed data set; 0."""
    if arguments.probe is not None and arguments.model_path is None:
        raise ConfigError("--probe needs --model-path, the model whose states it reads")
    job = _indexed(arguments)
    if job is None and arguments.out is None:
        raise ConfigError(
            f"--out is missing: name the file that the rows of {arguments.data} go to with their "
            f"risk (only of an indexed data set, with {arguments.data}.idx, there is a default)"
        )
    if arguments.probe is not None:
        own = (arguments.probe, arguments.model_path)
        if job is None:
            score_with_probe(*own, arguments.data, arguments.out)
        else:
            _score_indexed_with_probe(*own, job)
        return 0
    same = "endpoint model format local fail concurrency timeout_s cache allow_plain_http".split()
    given = {name: getattr(arguments, name) for name in same}
    settings = section_from_dict(CriticConfig, given, "risk.critic")
    if job is None:
        score_with_critic(settings, arguments.data, arguments.out)
    else:
        _score_indexed_with_critic(settings, job)
    return 0


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
