"""An evaluation as text: what `safereg eval` prints."""

from collections.abc import Iterator, Mapping
from typing import Any

from safereg_dist.errors import printable

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
    """The figures that are known, with intervals; by set, class, attack and judge; differences."""
    parts = [list(_figures(result))]
    for key, title in (("sets", "set"), ("kinds", "class")):
        if result.get(key):
            parts.append(list(_by(result[key], title)))
    if result.get("attacks"):
        parts.append(list(_rates(result["attacks"], "attack")))
    if result.get("judges"):
        rates, agreement = result["judges"]["rates"], result["judges"]["agreement"]
        parts.append(list(_rates(rates, "judge")))
        parts[-1] += [f"agree  {printable(names)}: {_share(v)}" for names, v in agreement.items()]
    if result.get("lm_eval"):
        parts.append(list(_harness(result["lm_eval"])))
    for name, other in result.get("against", {}).items():
        parts.append(list(_differences(name, other)))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _figures(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'figure':26s}{'value':>9s}{'95 % interval':>21s}{'rows':>7s}"
    for name, title in TITLES.items():
        value = result.get(name)
        if value is None:
            continue
        interval = result["intervals"].get(name)
        between = "" if interval is None else f"{_share(interval[0])} to {_share(interval[1])}"
        rows = result["counts"].get(name, result["counts"].get(_COUNTED.get(name, ""), ""))
        shown = f"{value:.2f}" if name == "response_perplexity" else _share(value)
        yield f"{title:26s}{shown:>9s}{between:>21s}{rows:>7}"


def _by(groups: Mapping[str, Mapping[str, Any]], title: str) -> Iterator[str]:
    shown = [n for n in _OF_SETS if any(group.get(n) is not None for group in groups.values())]
    yield f"{title:26s}" + "".join(f"{TITLES[name]:>25s}" for name in shown)
    for name, group in groups.items():
        yield f"{printable(name)[:25]:26s}" + "".join(f"{_share(group.get(n)):>25s}" for n in shown)


def _rates(groups: Mapping[str, Mapping[str, Any]], title: str) -> Iterator[str]:
    yield f"{title:26s}{'attack success':>16s}"
    for name, group in groups.items():
        note = "  (it trained this model)" if group.get("used_in_training") else ""
        yield f"{printable(name)[:25]:26s}{_share(group['attack_success_rate']):>16s}{note}"


def _harness(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each metric of each task, with its standard error."""
    yield f"{'lm-eval ' + found['version']:40s}{'metric':>20s}{'value':>10s}{'+-':>9s}{'rows':>7s}"
    for task, values in found["tasks"].items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if name == "rows" or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            shown = metric if kind in ("", "none") else name
            line = f"{printable(task)[:39]:40s}{printable(shown):>20s}{value:>10.4f}"
            yield f"{line}{'' if error is None else f'{error:.4f}':>9s}{values.get('rows', ''):>7}"


def _differences(name: str, other: Mapping[str, Any]) -> Iterator[str]:
    title = f"{'against ' + printable(name):26s}{'its value':>10s}{'difference':>12s}"
    yield f"{title}{'95 % interval':>21s}{'p':>8s}"
    for figure, tested in other["differences"].items():
        low, high = tested["interval"]
        p = "" if tested["p"] is None else f"{tested['p']:.3f}"
        yield (
            f"{TITLES[figure]:26s}{_share(other['figures'][figure]):>10s}"
            f"{_share(tested['difference'], signed=True):>12s}"
            f"{_share(low, signed=True) + ' to ' + _share(high, signed=True):>21s}{p:>8s}"
        )


def _share(value: float | None, *, signed: bool = False) -> str:
    """In per cent; small probabilities as they are, a dash where nothing is known."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.001 and not signed:
        return f"{value:.1e}"
    return f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %"
