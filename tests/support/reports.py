"""Folders of runs as training and evaluation leave them, and what a reader sees of a report."""

import json
from html.parser import HTMLParser
from pathlib import Path

from safereg_dist.evaluate.report.page import render
from safereg_dist.evaluate.report.reading import read_arms
from safereg_dist.storage.signing import checking_key

HOSTILE = "<script>alert(1)</script>\"'&\u202e$\\frac{x$"
"""A name that is to be shown as text."""


def evaluation(success: float, sampled: float, task: float | None) -> dict:
    return {
        "model": "runs/x/model",
        "judge": "keyword",
        "prompts": [{"file": "held-out.jsonl", "sha256": "0123456789abcdef" * 4, "rows": 9}],
        "attack_success_rate": success,
        "attack_success_rate_sampled": sampled,
        "refusal_probability": 1 - sampled,
        "benign_exact_match": 0.98765,
        "over_refusal_rate": 0.0,
        "task_exact_match": task,
        "intervals": {"attack_success_rate": [max(0.0, success - 0.05), 1.0], "task": None},
        "seconds": 1.5,
    }


def metrics(*, coefficient: float, active: int, seconds: float, steps: int = 40) -> list[dict]:
    return [
        {
            "step": step,
            "loss": 4.0 / (step + 1),
            "task_loss": 5.0 / (step + 1),
            "divergence": 0.1 if active else 0.0,
            "kl_coef_mean": coefficient * active / 8,
            "kl_coef_max": coefficient,
            "risk_mean": 0.2 if 0 < active < 8 else None,
            "risk_max": 0.9 if 0 < active < 8 else None,
            "rows": 8,
            "active_rows": active,
            "reference_rows": active,
            "tokens_per_s": 100 / seconds,
            "step_time_s": seconds,
            "peak_memory_bytes": 3 * 2**30,
        }
        for step in range(steps)
    ]


def write_run(folder: Path, rows: list[dict], **more: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in more.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def write_ledger(folder: Path, names: list[str], *, held: int = 1) -> None:
    """Rows of one step without a chain, of which the first `held` had b = 1."""
    rows = [
        {
            "step": 1,
            "id": name,
            "risk": 1 - at / 100,
            "estimator": "probe",
            "kl_coef": 1.0 if at < held else 0.0,
            "divergence": 0.25,
        }
        for at, name in enumerate(names)
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Collects what a browser would see of a file, or of a page's text."""

    def __init__(self, page: Path | str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.in_cell = False
        self.rows: list[list[str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        """Rows by what a screen reader calls their table."""
        self.feed(page if isinstance(page, str) else page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if dict(attrs).get("role") == "region":
            label = dict(attrs)["aria-label"] or ""
            assert label not in self.tables, f"two tables are called {label}"
            self.tables[label] = []
        if tag == "tr":
            self.rows.append([])
            self.tables[list(self.tables)[-1]].append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.in_cell = self.in_cell or tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def html_of(*runs: Path, key: str | None = None) -> str:
    """The page without figures, which take a second each and have tests of their own."""
    checking = None if key is None else checking_key(key)
    return render(read_arms(list(runs), may_be_empty=set(), key=checking), [], [])


def page_of(*runs: Path, key: str | None = None) -> Page:
    """What a browser would see of it."""
    return Page(html_of(*runs, key=key))


def write_demo(folder: Path) -> Path:
    """A demonstration's folder: base and four arms, one of which has lost its own folder."""
    write_run(folder / "sft", metrics(coefficient=0.0, active=0, seconds=0.5))
    write_run(folder / "static_high", metrics(coefficient=0.9, active=8, seconds=0.7))
    ours = write_run(folder / "adaptive_probe", metrics(coefficient=1.0, active=2, seconds=0.6))
    write_ledger(ours, [HOSTILE, "train-1", "train-2"])
    arms = {
        "sft": evaluation(1.0, 0.99, 1.0),
        "static_low": evaluation(0.9, 0.7, 0.97),
        "static_high": evaluation(0.0, 0.1, 0.0),
        "adaptive_probe": evaluation(0.004, 0.013, 0.99),
    }
    summary = {"base": evaluation(0.0, 0.0, 0.0), "arms": arms, "seconds": 99}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
