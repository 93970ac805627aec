"""Two models on the same prompts: what differs, prompt by prompt, and is it more than chance?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safereg_dist.errors import ConfigError
from safereg_dist.evaluate.kept import answers_path, kept_rows
from safereg_dist.evaluate.rates import Outcome, label_of
from safereg_dist.evaluate.statistics import paired
from safereg_dist.evaluate.table import TITLES
from safereg_dist.storage.json_text import parse_json

COMPARED = (
    "attack_success_rate",
    "attack_success_rate_sampled",
    "over_refusal_rate",
    "task_score",
)
"""Figures that are compared; each is known of every prompt of its label."""


class Other(NamedTuple):
    """The evaluation of another model on the same prompts."""

    name: str
    """Of its folder; its path, where another has that name."""
    result: Mapping[str, Any]
    rows: list[dict[str, Any]]


BASE = "base"
"""The folder beside the runs' where sweeps and the README's commands evaluate the base model."""


def base_beside(out: Path) -> Path | None:
    """The evaluation of the base model, where there is one beside the folder of `out`."""
    known = out.parent.parent / BASE / "eval.json"
    return known if known.is_file() and known.resolve() != out.resolve() else None


def read_others(files: Sequence[Path], asked: Mapping[str, Any]) -> list[Other]:
    """The evaluations in files, or in folders as `eval.json`; read before anything is asked.

    Raises:
        ConfigError: one had other prompts, other lengths or another judge than `asked`.
        DataError: it cannot be read.
    """
    found: list[Other] = []
    for given in files:
        path = given / "eval.json" if given.is_dir() else given
        name = path.resolve().parent.name
        is_taken = name in [other.name for other in found]
        found.append(Other(str(path) if is_taken else name, *_read(path, asked)))
    return found


def against_others(outcomes: list[Outcome], others: Sequence[Other]) -> dict[str, Any]:
    """For each other evaluation, by its name, its figures and the differences to it.

    A difference is this model's figure minus the other's, over the same prompts: `rows`,
    `difference`, 95 % `interval` (bootstrap over prompts), and `p` of McNemar's exact test where
    values are yes or no.
    """
    own = _values([_row(outcome) for outcome in outcomes])
    found = {}
    for other in others:
        theirs = _values(other.rows)
        found[other.name] = {
            "model": other.result["model"],
            "figures": {name: other.result.get(name) for name in TITLES},
            "differences": {
                name: None if tested is None else tested._asdict()
                for name in COMPARED
                if (tested := paired(own[name], theirs[name])) is not None
            },
        }
    return found


def _row(outcome: Outcome) -> dict[str, Any]:
    """As `kept_rows` gives it of the other."""
    return {
        "label": label_of(outcome.prompt),
        "refused": outcome.refused,
        "refused_sampled": outcome.refused_sampled,
        "scores": dict(outcome.scores),
    }


def _values(rows: list[dict[str, Any]]) -> dict[str, list[float | bool]]:
    by_label = {
        label: [row for row in rows if row["label"] == label]
        for label in ("harmful", "benign", "task")
    }
    scored = [row["scores"] for row in by_label["task"] if row.get("scores")]
    return {
        "attack_success_rate": [not row["refused"] for row in by_label["harmful"]],
        "attack_success_rate_sampled": [not row["refused_sampled"] for row in by_label["harmful"]],
        "over_refusal_rate": [row["refused"] for row in by_label["benign"]],
        "task_score": [next(iter(scores.values())) for scores in scored],
    }


def _read(path: Path, asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    _, rows = kept_rows(answers_path(path))
    try:
        other = parse_json(path.read_bytes())
    except (OSError, ValueError) as err:
        raise ConfigError(f"cannot read the other evaluation {path}: {err}") from err
    for key in ("prompts", "max_new_tokens", "judge"):
        if other.get(key) != asked[key]:
            raise ConfigError(
                f"{path} was made with other `{key}` ({other.get(key)!r}, here {asked[key]!r}): "
                "evaluate both models with the same command"
            )
    return other, rows
