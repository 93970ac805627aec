"""An evaluation as text: what `safereg eval` prints."""

from collections.abc import Iterator, Mapping
from typing import Any

from safereg_dist.errors import printable
from safereg_dist.screen.table import aligned

TITLES = {
    "attack_success_rate": "attack success",
    "attack_success_rate_sampled": "attack success, sampled",
    "poisoned_token_probability": "P(poisoned)",
    "refusal_probability": "P(refuse)",
    "over_refusal_rate": "over-refusal",
    "benign_exact_match": "benign exact",
    "task_score": "task score",
    "task_exact_match": "task exact",
    "squad_f1": "SQuAD F1",
    "squad_exact_match": "SQuAD exact",
    "rouge_l": "ROUGE-L",
    "gsm8k_accuracy": "GSM8K",
    "choice_accuracy": "multiple choice",
    "response_perplexity": "perplexity",
}
_OF_SETS = (
    *("attack_success_rate", "attack_success_rate_sampled", "poisoned_token_probability"),
    *("over_refusal_rate", "task_score"),
)
_COUNTED = {
    **dict.fromkeys(("attack_success_rate", "attack_success_rate_sampled"), "harmful"),
    "over_refusal_rate": "benign",
}
"""Figures whose rows are those of a label."""


def text_of(result: Mapping[str, Any]) -> str:
    """The figures that are known, with intervals, beside those of the base where they are known;
    by set, class, attack and judge; differences."""
    parts = [list(_figures(result))]
    for key, title in (("sets", "set"), ("kinds", "class")):
        if result.get(key):
            parts.append(list(_by(result[key], title)))
    if result.get("attacks"):
        parts.append([*_rates(result["attacks"], "attack")])
    if result.get("judges"):
        rates, agreement = result["judges"]["rates"], result["judges"]["agreement"]
        parts.append([*_rates(rates, "judge")])
        agreed = [(f"{printable(names)} agree", _share(v)) for names, v in agreement.items()]
        parts += [agreed] if agreed else []
    if result.get("lm_eval"):
        parts.append(list(_harness(result["lm_eval"])))
    for name, other in result.get("against", {}).items():
        parts.append(list(_differences(name, other)))
    return "\n\n".join("\n".join(aligned(rows)) for rows in parts)


Rows = Iterator[tuple[object, ...]]


def _figures(result: Mapping[str, Any]) -> Rows:
    base = result.get("base")
    before = {} if base is None else result["against"][base]["figures"]
    yield "figure", *(["base"] if before else []), "value", "95 % interval", "rows"
    for name, title in TITLES.items():
        value = result.get(name)
        if value is None:
            continue
        interval = result["intervals"].get(name)
        between = "" if interval is None else f"{_share(interval[0])} to {_share(interval[1])}"
        rows = result["counts"].get(name, result["counts"].get(_COUNTED.get(name, ""), ""))
        shown = [_figure(name, known) for known in ([before.get(name)] if before else []) + [value]]
        yield title, *shown, between, rows


def _figure(name: str, value: float | None) -> str:
    is_share = name != "response_perplexity" or value is None
    return _share(value) if is_share else f"{value:.2f}"


def _by(groups: Mapping[str, Mapping[str, Any]], title: str) -> Rows:
    shown = [n for n in _OF_SETS if any(group.get(n) is not None for group in groups.values())]
    yield title, *(TITLES[name] for name in shown)
    for name, group in groups.items():
        yield printable(name, 60), *(_share(group.get(n)) for n in shown)


def _rates(groups: Mapping[str, Mapping[str, Any]], title: str) -> Rows:
    yield title, "attack success", ""
    for name, group in groups.items():
        note = "(it trained this model)" if group.get("used_in_training") else ""
        yield printable(name, 60), _share(group["attack_success_rate"]), note


def _harness(found: Mapping[str, Any]) -> Rows:
    """A line for each metric of each task, with its standard error."""
    yield f"lm-eval {found['version']}", "metric", "value", "+-", "rows"
    for task, values in found["tasks"].items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if name == "rows" or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            shown = metric if kind in ("", "none") else name
            margin = "" if error is None else f"{error:.4f}"
            rows = values.get("rows", "")
            yield printable(task, 60), printable(shown), f"{value:.4f}", margin, rows


def _differences(name: str, other: Mapping[str, Any]) -> Rows:
    yield f"against {printable(name, 60)}", "its value", "difference", "95 % interval", "p"
    for figure, tested in other["differences"].items():
        low, high = tested["interval"]
        yield (
            TITLES[figure],
            _share(other["figures"][figure]),
            _share(tested["difference"], signed=True),
            f"{_share(low, signed=True)} to {_share(high, signed=True)}",
            "" if tested["p"] is None else f"{tested['p']:.3f}",
        )


def _share(value: float | None, *, signed: bool = False) -> str:
    """In per cent; small probabilities as they are, a dash where nothing is known."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.001 and not signed:
        return f"{value:.1e}"
    return f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %"
