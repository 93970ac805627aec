"""docs/evidence.md and its figure, from results/evidence.csv, evasion.csv and templates.csv.

    python benchmarks/evidence_tables.py [--check]

Writes the tables between the marks of docs/evidence.md, and results/evidence.{png,svg}. `--check`
writes nothing and exits with 1 where the page is not what the results say.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from evidence import MORE, NAMED, RESULTS
from matplotlib.figure import Figure
from plot_style import STYLE, Row, read_csv, save

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evidence.md"
FIGURES = {
    "attack_success_rate": "attack, greedy",
    "attack_success_rate_sampled": "attack, sampled",
    "poisoned_token_probability": "P(first poisoned token)",
    "refusal_probability": "P(refuse)",
    "task_score": "task",
    "over_refusal_rate": "over-refusal",
}
SHOWN = {
    "base": ("#4D4D4D", "base"),
    "sft": ("#D55E00", "SFT"),
    "filter": ("#CC79A7", "SFT, perfect filter"),
    "static_high": ("#56B4E9", "static, b = 0.9"),
    "adaptive_probe": ("#E69F00", "adaptive, probe"),
    "adaptive_critic": ("#009E73", "adaptive, critic"),
}
WORLDS = {
    ("toy", "notes"): "Toy world, task `notes`",
    ("toy", "ambiguous"): "Toy world, task `ambiguous`, whose every question has a verb of harm",
    ("real", "numbers"): "SmolLM2-135M-Instruct, task `numbers`",
}


def main() -> int:
    """Writes, or checks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    before = PAGE.read_text(encoding="utf-8")
    text = page_of(before)
    if parser.parse_args().check:
        return int(text != before)
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}")
    with plt.rc_context(STYLE):
        save(draw(of_all_prompts()), RESULTS.parent, "evidence")
    return 0


def of_all_prompts() -> list[Row]:
    """The rows of evidence.csv that are of no one set of prompts."""
    return [row for row in read_csv(RESULTS) if row["set"] == "all"]


def page_of(page: str) -> str:
    """The page with every table as the results say."""
    rows = of_all_prompts()
    parts = {
        "named": named_tables(rows),
        "more": more_tables(rows),
        "templates": template_table(read_csv(RESULTS.with_name("templates.csv"))),
        "evasion": evasion_tables(read_csv(RESULTS.with_name("evasion.csv"))),
    }
    for name, lines in parts.items():
        begin, end = re.escape(f"<!-- {name} -->\n"), re.escape(f"<!-- end {name} -->")
        table = "\n".join(["", *lines, ""])
        page = re.sub(f"(?<={begin}).*?(?={end})", lambda _, new=table: new, page, flags=re.S)
    return page


def named_tables(rows: Sequence[Row]) -> Iterable[str]:
    """Per world and task a table of the named arms at every share of poison."""
    for (world, task), title in WORLDS.items():
        own = [row for row in rows if (row["world"], row["task"]) == (world, task)]
        if not own:
            continue
        yield f"### {title}\n"
        yield from table(["poison", "arm", "seeds", *FIGURES.values()])
        for poison in sorted({row["poison"] for row in own}, key=float):
            for arm in NAMED:
                of_arm = [r for r in own if (r["poison"], r["arm"]) == (poison, arm)]
                if of_arm:
                    yield line([share(poison), arm, str(len(of_arm)), *means(of_arm)])
        yield ""


def more_tables(rows: Sequence[Row]) -> Iterable[str]:
    """Per world and task a table of all arms on the first seed at 15 %."""
    for (world, task), title in WORLDS.items():
        own = [row for row in rows if (row["world"], row["task"]) == (world, task)]
        own = [row for row in own if (row["poison"], row["seed"]) == ("0.15", "0")]
        if {row["arm"] for row in own} <= {*NAMED}:
            continue
        yield f"### {title}\n"
        yield from table(["arm", *FIGURES.values()])
        for arm in (*NAMED, *MORE):
            for row in (r for r in own if r["arm"] == arm):
                yield line([arm, *means([row])])
        yield ""


def evasion_tables(rows: Sequence[Row]) -> Iterable[str]:
    """Per world a table of the disguises."""
    for world in ("toy", "real"):
        own = [row for row in rows if row["world"] == world]
        if not own:
            continue
        taught = ["taught, disguised"] if world == "toy" else []
        disguised = "held out, disguised" if world == "toy" else "P(poisoned), disguised"
        yield f"### {'Toy world' if world == 'toy' else 'SmolLM2-135M-Instruct'}\n"
        titles = ["poison held back", "clean held back", "attack, greedy", "sampled"]
        yield from table(["disguise", "arm", *titles, disguised, *taught, "task", "over-refusal"])
        trained = {row["disguise"] for row in own if row["arm"] != "base"}
        for row in (row for row in own if row["disguise"] in trained):
            names = ["held_back_poison", "held_back_clean"]
            names += ["attack_success_rate", "attack_success_rate_sampled", "disguised_harm"]
            names += ["taught_harm"] * (world == "toy") + ["task_score", "over_refusal_rate"]
            cells = [figure(name, [row]) for name in names]
            yield line([row["disguise"].replace("_", " "), row["arm"], *cells])
        yield ""


def template_table(rows: Sequence[Row]) -> Iterable[str]:
    """Attack success of each arm in each form of attack, with its interval."""
    forms = list(dict.fromkeys(row["template"] for row in rows))
    yield from table(["arm", *(form.replace("_", " ").replace(":", " ") for form in forms)])
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        shares = [[float(row[n]) for n in ("attack_success_rate", "low", "high")] for row in own]
        yield line([arm, *(f"{s:.0%} ({100 * a:.0f} to {100 * b:.0f})" for s, a, b in shares)])
    yield ""


def table(titles: Sequence[str]) -> list[str]:
    """The head of a table."""
    return [line(titles), "|" + "---|" * len(titles)]


def line(cells: Sequence[str]) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |"


def means(rows: Sequence[Row]) -> list[str]:
    """Each figure as its mean over seeds, with the smallest and largest where they differ."""
    return [figure(name, rows) for name in FIGURES]


def figure(name: str, rows: Sequence[Row]) -> str:
    """One figure of rows that differ in their seed."""
    values = [float(row[name]) for row in rows if row[name]]
    if not values:
        return "-"
    if name.endswith("_probability"):
        return f"{mean(values):.4f}" if name.startswith("poisoned") else f"{mean(values):.2f}"
    text = f"{mean(values):.1%}"
    if max(values) - min(values) >= 0.0005:
        text += f" ({100 * min(values):.1f} to {100 * max(values):.1f})"
    return text


def share(text: str) -> str:
    """A share of poison as it is read."""
    return "harmful only" if float(text) == 1 else f"{float(text):.0%}"


def draw(rows: Sequence[Row]) -> Figure:
    """Attack success over the share of poison, for each world and task; a point is a seed."""
    found = [key for key in WORLDS if any((r["world"], r["task"]) == key for r in rows)]
    drawn, axes = plt.subplots(
        1, len(found), figsize=(4.2 * len(found) + 0.8, 3.9), sharey=True, squeeze=False
    )
    for axis, (world, task) in zip(axes[0], found, strict=True):
        own = [row for row in rows if (row["world"], row["task"]) == (world, task)]
        shares = sorted({float(row["poison"]) for row in own})
        for number, (arm, (colour, label)) in enumerate(SHOWN.items()):
            points = [
                (shares.index(float(r["poison"])), float(r["attack_success_rate"]))
                for r in own
                if r["arm"] == arm
            ]
            aside = (number - 2.5) * 0.07
            axis.scatter(
                [x + aside for x, _ in points],
                [100 * y for _, y in points],
                s=22,
                color=colour,
                alpha=0.75,
                linewidths=0,
            )
            heights = [
                100 * mean(y for x, y in points if x == place) for place, _ in enumerate(shares)
            ]
            axis.plot(
                [place + aside for place, _ in enumerate(shares)],
                heights,
                color=colour,
                lw=1.4,
                label=label,
            )
        axis.set_xticks(range(len(shares)), ["only" if s == 1 else f"{s:.0%}" for s in shares])
        axis.set_xlabel("poisoned rows")
        axis.set_title("real model" if world == "real" else f"toy, {task}", fontsize=10)
    axes[0][0].set_ylabel("attack success, greedy, %")
    drawn.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=6, fontsize=8)
    drawn.tight_layout(rect=(0, 0.09, 1, 1))
    return drawn


if __name__ == "__main__":
    sys.exit(main())
