"""The risk of every row of a data file, ahead of time: training then reads it as a column.

The rows come out in their order with all their fields, with `risk`, and with `risk_failed: true`
where the judge failed. Judgements are cached as they arrive: repeating the command resumes a killed
run, and requests only the failed judgements of a finished one.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from safereg_dist.commands.options import at_least
from safereg_dist.config import CriticConfig, section_from_dict
from safereg_dist.critic.critic import build_critic, score_conversations
from safereg_dist.critic.verdict import Messages, Verdict
from safereg_dist.data.files import read_rows
from safereg_dist.data.formats import conversation_of
from safereg_dist.errors import ConfigError, DataError
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


def _conversations(data: Path) -> Iterator[tuple[dict, Messages]]:
    """Each row of the file, and its conversation as a judge reads it, with an assistant turn."""
    is_empty = True
    for where, row in read_rows(data):
        yield row, conversation_of(row, where).as_text()
        is_empty = False
    if is_empty:
        raise DataError(f"{data} holds no row: give at least one")


def _write(out: Path, data: Path, verdicts: Iterable[Verdict]) -> Counter[str]:
    """Writes the rows with their verdicts; how many failed, by reason."""
    failures: Counter[str] = Counter()
    with whole_file(out) as file:
        for (_, row), verdict in zip(read_rows(data), verdicts, strict=True):
            row = {k: v for k, v in row.items() if k != "risk_failed"} | {"risk": verdict.score}
            if verdict.failed:
                row["risk_failed"] = True
                failures[verdict.reason or "unknown"] += 1
            file.write((json.dumps(row) + "\n").encode())
    return failures


def _summary(count: int, failures: Counter[str], fail: str, out: Path) -> str:
    failed = failures.total()
    if not failed:
        return f"score: {count} rows, 0 failed judgements, written to {out}"
    reasons = ", ".join(f"{number} x {reason}" for reason, number in failures.most_common(4))
    meaning = "risk 1" if fail == "closed" else "risk 0"
    return (
        f"score: {count} rows, {failed} failed judgements that count as {meaning} ({reasons}); the "
        f"same command asks for those again; written to {out}"
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
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fail", choices=("closed", "open", "stop"), default="closed")
    parser.add_argument("--concurrency", type=at_least(1), default=16)
    parser.add_argument("--timeout-s", type=float, default=30.0, help="of one judgement")
    parser.add_argument("--cache", metavar="FILE", help="of known scores; `none` for no cache")


def run(arguments: argparse.Namespace) -> int:
    """Writes the data with a risk in every row; 0."""
    if arguments.probe is not None:
        if arguments.model_path is None:
            raise ConfigError("--probe needs --model-path, the model whose states it reads")
        score_with_probe(arguments.probe, arguments.model_path, arguments.data, arguments.out)
        return 0
    same = "endpoint model format local fail concurrency timeout_s cache".split()
    given = {name: getattr(arguments, name) for name in same}
    settings = section_from_dict(CriticConfig, given, "risk.critic")
    score_with_critic(settings, arguments.data, arguments.out)
    return 0
