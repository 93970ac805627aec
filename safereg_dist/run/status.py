"""A step in a few words: what the progress bar and `safereg watch` show of a row of metrics."""

from collections.abc import Mapping

_PASSES = 3
"""What training on a row costs, in forwards: its own, and a backward of two."""


def status_of(row: Mapping[str, float | int | None]) -> dict[str, str]:
    """Loss, risky share of the rows, mean coefficient, the reference's share, tokens a second."""
    return {
        "loss": _shown(row.get("loss"), ".4f"),
        "risky": _shown(row.get("risky_fraction"), ".0%"),
        "kl_coef": _shown(row.get("kl_coef_mean"), ".2f"),
        "reference": _shown(reference_share(row), ".0%"),
        "tokens/s": _shown(row.get("tokens_per_s"), ".3g"),
    }


def reference_share(row: Mapping[str, float | int | None]) -> float:
    """About the reference's share of a step's FLOPs, in [0, 1].

    r / (3 n + r) for r forwards of the reference and n rows that train, were all rows equally long
    and the reference as large as the policy. Probes and heads are left out.
    """
    trained, ran = row.get("rows") or 0, row.get("reference_rows") or 0
    return ran / max(_PASSES * trained + ran, 1)


def _shown(value: float | int | None, form: str) -> str:
    if value is None:
        return "-"
    # tqdm would write 1.2e+03 for what is read as a number of thousands.
    return f"{value:,.0f}" if form == ".3g" and value >= 1000 else format(value, form)
