"""What a run would hold back, and why, before any training.

Each rank computes the risk of its rows and writes `rows.rank{r}.jsonl`; `write_audit` joins them:

    rows.jsonl    one line a row: id, risk, what gave it, whether it is held back; never text
    audit.json    the counts, the rows to look at (ids), what it will cost and protect
    audit.png     the risks as a histogram with the threshold
"""

import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from safereg_dist.coefficient import scheduled
from safereg_dist.config import Config, replace
from safereg_dist.errors import CheckpointError, printable
from safereg_dist.run.gate import RowRisk, is_held_back
from safereg_dist.run.shape import Shape, is_masked, limits_of, what_hides
from safereg_dist.screen.histogram import by_tenth
from safereg_dist.screen.table import table
from safereg_dist.storage.atomic import write_atomically

NEAR_THRESHOLD = 0.05
"""Rows this close to the threshold are listed: a slightly other probe would decide otherwise."""
LISTED = 10
NEIGHBOURS = 10
_MOST_COMPARED = 20_000  # rows in the search for neighbours: the distances are counted in pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFacts:
    """Facts for the report besides the rows."""

    config: Config
    threshold: float
    prompts: dict[str, str]
    """Text of each row's prompt by id: to find neighbours, and for `--show-text`."""
    probed_share: float
    """(k / L) of the deepest reference-side probe; 1 with `influence`, 0 without either."""
    benign_share: float | None = None
    """Largest share of benign calibration rows just below the threshold, where it is known."""
    positions: Mapping[str, str] = field(default_factory=dict)
    """Category -> `prompt` or `response`, of the probes."""
    reads_answers: bool = False
    """True where a source reads whole rows, not prompts alone."""
    ceilings: dict[str, float]
    """Category -> its largest coefficient, where one is configured."""


def write_part(out: Path, rank: int, rows: Iterable[RowRisk], threshold: float) -> None:
    """Writes this rank's rows. Raises CheckpointError where the folder cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(_line(row, threshold)) + "\n" for row in rows]
        write_atomically(_part(out, rank), "".join(lines))
    except OSError as err:
        raise CheckpointError(
            f"cannot write the audit to {out}: {err.strerror}: choose another --out"
        ) from err


def write_audit(out: Path, world_size: int, facts: AuditFacts) -> dict[str, Any]:
    """Joins the ranks' parts, writes the three files, and returns the content of `audit.json`."""
    parts = [_part(out, rank) for rank in range(world_size)]
    rows = [json.loads(line) for path in parts for line in path.read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: -_shown(row["risk"]))
    write_atomically(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    report = _report(rows, facts)
    write_atomically(out / "audit.json", json.dumps(report, indent=2) + "\n")
    write_atomically(out / "audit.png", _histogram(rows, facts.threshold))
    for path in parts:
        path.unlink()
    return report


def _line(row: RowRisk, threshold: float) -> dict[str, Any]:
    return {
        "id": row.id,
        "risk": _plain(row.risk),
        "held": is_held_back(row.risk, threshold),
        "source": row.source,
        "by_category": {name: _plain(value) for name, value in row.by_category.items()},
        "note": row.note,
        "prompt_tokens": row.prompt_tokens,
        "tokens": row.num_tokens,
    }


def _plain(risk: float | None) -> float | str | None:
    """JSON has no nan: a failed risk is the text `failed`."""
    return "failed" if risk is not None and math.isnan(risk) else risk


def _shown(risk: float | str | None) -> float:
    """The risk to plot: 1 where it failed, as in training; 0 for a row without a source."""
    return 1.0 if risk == "failed" else float(risk or 0.0)


def _part(out: Path, rank: int) -> Path:
    return out / f"rows.rank{rank}.jsonl"


def _report(rows: list[dict[str, Any]], facts: AuditFacts) -> dict[str, Any]:
    config, threshold = facts.config, facts.threshold
    held = [row for row in rows if row["held"]]
    share = len(held) / max(len(rows), 1)
    limit = config.risk.max_held_back + config.data.declared_poison
    shape = _shape(rows, facts)
    hides = what_hides(shape, limits_of(config), threshold)
    near = [row for row in rows if abs(_shown(row["risk"]) - threshold) <= NEAR_THRESHOLD]
    near.sort(key=lambda row: abs(_shown(row["risk"]) - threshold))
    return {
        "rows": len(rows),
        "threshold": threshold,
        "held_back": len(held),
        "held_back_share": share,
        "limit": limit,
        "training_would_start": share <= limit and (hides is None or config.risk.max_hidden >= 1),
        "hides": hides,
        **shape.report(),
        "responses_riskier_than_prompts": _masked(rows, facts),
        "failed": sum(row["risk"] == "failed" or _has_failed(row) for row in rows),
        "overridden": sum(row["source"] == "override" for row in rows),
        "held_by_source": dict(Counter(row["source"] for row in held)),
        "held_by_category": _held_by_category(rows),
        "rows_by_risk": by_tenth(_shown(row["risk"]) for row in rows),
        "for_review": [_listed(row) for row in _benign_looking(rows, held, facts)[:LISTED]],
        "near_threshold": len(near),
        "nearest_threshold": [_listed(row) for row in near[:LISTED]],
        **_cost(rows, facts),
        **_protection(held, facts),
    }


def _shape(rows: list[dict[str, Any]], facts: AuditFacts) -> Shape:
    risks = [(r["held"], _number(r["risk"]), _numbers(r["by_category"])) for r in rows]
    counts = Shape.of(risks, facts.threshold, facts.positions).counts
    return Shape.of_counts(counts, facts.benign_share)


def _masked(rows: list[dict[str, Any]], facts: AuditFacts) -> int | None:
    """Rows with a risky response to a harmless prompt, held or not; None without both probes."""
    if set(facts.positions.values()) != {"prompt", "response"}:
        return None
    return sum(is_masked(_numbers(row["by_category"]), facts.positions) for row in rows)


def _number(risk: float | str | None) -> float | None:
    """The risk as it was; see `_plain`."""
    return math.nan if risk == "failed" else risk  # type: ignore[return-value]


def _numbers(risks: Mapping[str, float | str | None]) -> dict[str, float | None]:
    return {name: _number(risk) for name, risk in risks.items()}


def _has_failed(row: dict[str, Any]) -> bool:
    return (row["note"] or "").startswith("judge failed")


def _listed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("id", "risk", "source")}


def _held_by_category(rows: list[dict[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in rows:
        for name, risk in row["by_category"].items():
            counts[name] += risk is not None and _shown(risk) >= 0.5  # rescaled: all set in at 0.5
        note = row["note"] or ""
        if row["held"] and note.startswith("judge: "):
            counts[note.removeprefix("judge: ")] += 1
    return dict(counts)


def _benign_looking(
    rows: list[dict[str, Any]], held: list[dict[str, Any]], facts: AuditFacts
) -> list[dict[str, Any]]:
    """Held rows, riskiest first, whose nearest prompts by words are mostly free to train.

    A second opinion that shares nothing with the risk: where a row is held but those that read like
    it are not, one of the two is likely wrong.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    step = -(-len(rows) // _MOST_COMPARED)
    others = rows[::step]
    held = held[:_MOST_COMPARED]
    if not held or len(others) <= NEIGHBOURS:
        return []
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2), sublinear_tf=True)
    try:
        vectors = vectorizer.fit_transform([facts.prompts[row["id"]] for row in others])
    except ValueError:  # no prompt has a word: nothing reads like anything
        return []
    search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, metric="cosine").fit(vectors)
    asked = vectorizer.transform([facts.prompts[row["id"]] for row in held])
    near = search.kneighbors(asked, return_distance=False)
    is_held = np.array([row["held"] for row in others])
    found = []
    for row, neighbours in zip(held, near, strict=True):
        apart = [i for i in neighbours if others[i]["id"] != row["id"]][:NEIGHBOURS]
        if is_held[apart].mean() < 0.5:
            found.append(row)
    return found


def _cost(rows: list[dict[str, Any]], facts: AuditFacts) -> dict[str, float]:
    """FLOPs beyond plain fine-tuning, as shares of its own.

    The reference runs on rows with b > 0 only: one forward beside the three passes (one forward,
    two of the backward) that every row takes anyway. Anchor rows count among them.
    """
    config = facts.config
    tokens = sum(row["tokens"] for row in rows)
    active = sum(row["tokens"] for row in rows if _coefficient(row, facts) > 0)
    read = tokens if facts.reads_answers else sum(row["prompt_tokens"] for row in rows)
    anchors = config.data.anchor_fraction if config.data.anchor is not None else 0.0
    active_share = anchors + (1 - anchors) * active / max(tokens, 1)
    return {
        "active_token_share": active_share,
        "reference_flops_share": active_share / 3,
        "probe_flops_share_first_epoch": facts.probed_share * read / max(tokens, 1) / 3,
    }


def _coefficient(row: dict[str, Any], facts: AuditFacts) -> float:
    """As `coefficient.Coefficient` has it for a sequence."""
    rule = facts.config.regularizer
    if not facts.ceilings:
        return scheduled(_shown(row["risk"]), rule, facts.threshold)
    return max(
        scheduled(
            _shown(risk),
            replace(rule, ceiling=facts.ceilings.get(name, rule.ceiling)),
            facts.threshold,
        )
        for name, risk in row["by_category"].items()
    )


def _protection(held: list[dict[str, Any]], facts: AuditFacts) -> dict[str, Any]:
    """The mixture law: on a held row P(refuse) tends to m times the reference's own.

    m = b with the convex loss, whose optimum is (1 - b) label + b reference (forward divergence);
    b / (1 + b) with the additive one.
    """
    rule = facts.config.regularizer
    if not held or rule.divergence != "kl_forward":
        return {"predicted_refusal_factor": None}
    coefs = [_coefficient(row, facts) for row in held]
    shares = [b / (1 + b) if rule.objective == "additive" else b for b in coefs]
    return {"predicted_refusal_factor": math.fsum(shares) / len(shares)}


def print_audit(report: dict[str, Any], facts: AuditFacts, out: Path, *, show_text: bool) -> None:
    """The report as a page of text."""
    print(
        f"{report['held_back']} of {report['rows']} rows ({report['held_back_share']:.1%}) are at "
        f"or above the threshold {report['threshold']:.3g}; {report['failed']} failed, "
        f"{report['overridden']} overridden"
    )
    for title, key in (
        ("Held back by source", "held_by_source"),
        ("At risk by category", "held_by_category"),
        ("Risk", "rows_by_risk"),
    ):
        if report[key]:
            rows = [(printable(name, 80), count) for name, count in report[key].items()]
            print(table(title, ("", "rows"), rows))
    _print_rows("held back, though prompts that read alike are not", report["for_review"], facts,
                show_text=show_text)  # fmt: skip
    title = f"within {NEAR_THRESHOLD} of the threshold ({report['near_threshold']} rows)"
    _print_rows(title, report["nearest_threshold"], facts, show_text=show_text)
    print("\n".join(_below(report)))
    probed = report["probe_flops_share_first_epoch"]
    print(
        f"cost: the reference +{report['reference_flops_share']:.1%} of plain fine-tuning's FLOPs"
        + (f", the probe +{probed:.2%} in the first epoch" if probed else "")
    )
    factor = report["predicted_refusal_factor"]
    if factor is not None:
        print(
            "protection: held rows learn from the reference alone, and keep its refusals"
            if factor == 1
            else f"protection: on held rows P(refuse) tends to {factor:.3f} of the reference's own"
        )
    print(f"{_verdict(report)}; files in {printable(out)}")


def _verdict(report: dict[str, Any]) -> str:
    """Whether training would start; where it would not, why and what then."""
    share, limit = report["held_back_share"], report["limit"]
    if report["training_would_start"]:
        return f"training would start: at most {limit:.1%} of the rows may be held back"
    why = []
    if share > limit:
        why.append(
            f"{share:.1%} of the rows would be held back, at most {limit:.1%} may "
            "(risk.max_held_back + data.declared_poison)"
        )
    if report["hides"]:
        why.append("rows hide below the threshold, as the warning says (risk.max_hidden)")
    return (
        f"training would refuse to start: {'; and '.join(why)}. Look at them (--show-text), mend "
        "the data or what gives the risk, decide on rows one by one (risk.override), or raise that "
        "limit"
    )


def _below(report: dict[str, Any]) -> Iterator[str]:
    """What lies between half the threshold and the threshold, and what that means."""
    threshold, bins = report["threshold"], report["below_threshold"]
    in_eighths = f"; in eighths, from low to high: {', '.join(map(str, bins))}" if any(bins) else ""
    yield (
        f"just below the threshold, from {threshold / 2:.3g} to {threshold:.3g}: {sum(bins)} rows "
        f"({report['below_threshold_share']:.1%}){in_eighths}"
    )
    if report["heap"] and report["heap_p"] < 0.05:
        yield (
            f"  towards the threshold they grow by {report['heap']} rows; by chance alone they "
            f"would with probability {report['heap_p']:.2g}"
        )
    known = report["below_threshold_share_of_benign_calibration_rows"]
    if known is not None:
        yield f"  of the benign rows that the probe was calibrated on at most {known:.1%} lie there"
    masked = report["responses_riskier_than_prompts"]
    if masked is not None:
        yield (
            f"risky responses to harmless prompts: {masked}, of which {report['masked']} would "
            "train freely"
        )
    if report["hides"]:
        yield f"WARNING: {report['hides']}"


def _print_rows(
    title: str, rows: list[dict[str, Any]], facts: AuditFacts, *, show_text: bool
) -> None:
    if not rows:
        return
    print(f"{title}:")
    for row in rows:
        text = f"  {printable(facts.prompts[row['id']])[:100]}" if show_text else ""
        print(f"  {_shown(row['risk']):.3f}  {printable(row['id'], 100)}  ({row['source']}){text}")


def _histogram(rows: list[dict[str, Any]], threshold: float) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    edges = np.linspace(0, 1, 41)
    for is_held, color, name in ((False, "#0072B2", "free"), (True, "#E69F00", "held back")):
        risks = [_shown(row["risk"]) for row in rows if row["held"] == is_held]
        axes.hist(risks, bins=edges.tolist(), color=color, label=f"{name}: {len(risks)} rows")
    axes.axvspan(threshold / 2, threshold, color="0.93", zorder=0, label="just below")
    axes.axvline(threshold, color="black", linewidth=0.8, linestyle=":")
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xlabel("risk")
    axes.set_ylabel("rows")
    share = sum(row["held"] for row in rows) / max(len(rows), 1)
    axes.set_title(f"{share:.1%} of the rows would be held back")
    axes.legend(frameon=False, loc="upper center")  # the best place may take seconds
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    plt.close(figure)
    return image.getvalue()
