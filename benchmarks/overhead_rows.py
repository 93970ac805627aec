"""The rows of overhead.csv: from measured cases, and from shapes on the meta device."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_probe_flops import head_flops
from overhead_cases import FRACTIONS, PROMPT_TOKENS, RESPONSE_TOKENS, model_shape
from overhead_worker import SOURCES, Case
from plot_style import read_csv
from real_shapes import REAL_SHAPES, RealModel
from transformers import PretrainedConfig

from safereg_dist.demo.tokenizer import build_tokenizer

META_TOKENS, META_RESPONSE_TOKENS, META_ROWS = 1024, 512, 100
COLUMNS = [
    *("date", "hardware", "commit", "torch", "transformers", "deepspeed", "device", "ranks"),
    *("model", "hidden_size", "layers", "vocab", "sequence_tokens", "response_tokens"),
    *("rows_per_step", "micro_batch_size", "grad_accum_steps", "risky_fraction", "risky_rows"),
    *("arm", "risk_source", "reference_rows", "flops", "flops_ratio_to_sft", "total_bytes"),
    *("bytes_ratio_to_sft", "safety_bytes_per_micro_batch", "seconds", "time_ratio_to_sft"),
    *("time_ratio_q20", "time_ratio_q80", "rounds", "peak_memory_bytes", "loss"),
]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The cases of one process group."""

    model: str
    ranks: int
    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        """Of its log."""
        return f"{self.model}-{self.ranks}"

    def result(self, case: Case, work: Path) -> Path:
        """Where the figures of a case are kept."""
        return work / "measured" / f"{self.name}-{case.name}.json"


def rows_of(launch: Launch, work: Path) -> Iterator[Row]:
    """Rows of the CSV for the measured cases of a launch."""
    shape = model_shape(launch.model, len(build_tokenizer()))
    for case in launch.cases:
        measured = json.loads(launch.result(case, work).read_text("utf-8"))
        facts = {
            "hardware": measured["hardware"],
            "commit": measured["commit"],
            "device": measured["device"],
            "ranks": launch.ranks,
            "model": launch.model,
            **_shape_facts(shape),
            "sequence_tokens": PROMPT_TOKENS + RESPONSE_TOKENS,
            "response_tokens": RESPONSE_TOKENS,
            "rows_per_step": case.num_rows,
            "micro_batch_size": case.micro_batch_size,
            "grad_accum_steps": case.num_rows // (case.micro_batch_size * launch.ranks),
            "risky_fraction": case.fraction,
            "risky_rows": case.num_risky,
            "rounds": case.rounds or None,
        }
        for name, figures in measured["arms"].items():
            if name != "sft again":
                yield facts | _arm_row(name, figures, measured["arms"])


def _arm_row(name: str, figures: Row, arms: dict[str, Row]) -> Row:
    plain = arms["sft"]
    row = {key: value for key, value in figures.items() if key in COLUMNS}
    row |= {
        **{key: _exact(figures[key]) for key in ("loss", "safety_bytes_per_micro_batch")},
        "arm": name.partition(":")[0],
        "risk_source": SOURCES[name],
        "flops_ratio_to_sft": figures["flops"] / plain["flops"],
        "bytes_ratio_to_sft": figures["total_bytes"] / plain["total_bytes"],
        "seconds": statistics.median(figures["seconds"]) if figures["seconds"] else None,
    }
    # Plain fine-tuning is compared with itself: a second engine that takes turns with the first.
    own = arms.get("sft again", {"seconds": []}) if name == "sft" else figures
    ratios = [own / sft for own, sft in zip(own["seconds"], plain["seconds"], strict=False)]
    return row | _quantiles(ratios)


def _exact(value: float) -> str:
    """All digits of a float32, where the table would write six."""
    return f"{value:.10g}"


def _quantiles(ratios: Sequence[float]) -> Row:
    names = ("time_ratio_to_sft", "time_ratio_q20", "time_ratio_q80")
    if not ratios:
        return dict.fromkeys(names)
    if len(ratios) == 1:
        return dict.fromkeys(names, ratios[0])
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    return dict(zip(names, (statistics.median(ratios), fifths[0], fifths[3]), strict=True))


def _shape_facts(shape: PretrainedConfig) -> Row:
    return {
        "hidden_size": shape.hidden_size,
        "layers": shape.num_hidden_layers,
        "vocab": shape.vocab_size,
    }


def meta_rows() -> Iterator[Row]:
    """FLOPs of a step of rows of one length on real shapes, by risky fraction and arm."""
    for name, shape in REAL_SHAPES.items():
        flops = meta_flops(RealModel(shape), META_TOKENS, META_RESPONSE_TOKENS)
        for fraction in FRACTIONS:
            for arm, (always, risky) in flops.items():
                yield {
                    **_shape_facts(shape),
                    "device": "meta",
                    "ranks": 1,
                    "model": name,
                    "sequence_tokens": META_TOKENS,
                    "response_tokens": META_RESPONSE_TOKENS,
                    "rows_per_step": META_ROWS,
                    "risky_fraction": fraction,
                    "risky_rows": round(fraction * META_ROWS),
                    "arm": arm,
                    "risk_source": SOURCES[arm],
                    "flops": META_ROWS * always + round(fraction * META_ROWS) * risky,
                    "flops_ratio_to_sft": (always + fraction * risky) / flops["sft"][0],
                }


def meta_flops(model: RealModel, tokens: int, responses: int) -> dict[str, tuple[int, int]]:
    """By arm: FLOPs of a row whatever its risk, and those that a risky one has beyond that.

    The first epoch's probe reads the first half of the reference over the prompt. Trunks are run on
    the meta device; a head is its products: one a position for logits, two more to train it.
    """
    layers = model.shape.num_hidden_layers
    plain = model.trunk(tokens).flops + head_flops(model.shape, responses)
    trunk = model.prefix(tokens, layers).flops
    logits = head_flops(model.shape, responses) // 3
    probe = model.prefix(tokens - responses, layers // 2).flops
    whole = model.trunk(tokens).flops + head_flops(model.shape, tokens)
    return {
        "sft": (plain, 0),
        "routed": (plain, trunk + logits),
        "routed_first_epoch": (plain + probe, trunk + logits),
        "stored": (plain, logits),
        "always_on": (whole + trunk + head_flops(model.shape, tokens) // 3, 0),
    }


def print_table(rows: Sequence[Row]) -> None:
    """One line for each case and arm."""
    print(
        "device model         ranks rows risky  arm                 risk from         "
        "FLOPs   bytes    time   memory"
    )
    for row in rows:
        cells = [
            f"{row['device']:6s} {row['model']:13s} {row['ranks']:>5d} {row['rows_per_step']:>4d} "
            f"{row['risky_fraction']:>5.0%}  {row['arm']:19s} {row['risk_source']:15s}",
            *(
                " " * 7 if row.get(name) is None else f"{row[name]:7.3f}"
                for name in ("flops_ratio_to_sft", "bytes_ratio_to_sft", "time_ratio_to_sft")
            ),
            f"{row['peak_memory_bytes'] / 2**20:6.1f} MiB" if row.get("peak_memory_bytes") else "",
        ]
        print(" ".join(cells))


def read_table(path: Path) -> list[Row]:
    """The rows of the CSV with numbers for numbers and None for empty cells."""
    return [{key: _value(value) for key, value in row.items()} for row in read_csv(path)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
