"""What a check has found, and how it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the table."""

    check: str
    found: str
    expected: str
    verdict: Verdict
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


def finding(
    check: str, is_good: bool, *, found: str, expected: str, remedy: str, bad: Verdict = "FAIL"
) -> Finding:
    """`ok`, or else `bad` with its remedy."""
    if is_good:
        return Finding(check=check, found=found, expected=expected, verdict="ok")
    return Finding(check=check, found=found, expected=expected, verdict=bad, remedy=remedy)


def table(findings: Sequence[Finding]) -> str:
    """The findings as text, each remedy below its line."""
    cells = [("", "check", "found", "expected")]
    cells += [(f.verdict, f.check, f.found, f.expected) for f in findings]
    widths = [min(60, max(len(row[column]) for row in cells)) for column in range(3)]
    lines = []
    for row, each in zip(cells, (None, *findings), strict=True):
        left = "  ".join(text.ljust(width) for text, width in zip(row[:3], widths, strict=True))
        lines.append(f"{left}  {row[3]}".rstrip())
        if each is not None and each.remedy:
            lines.append(f"{'':{widths[0]}}  -> {each.remedy}")
    return "\n".join(lines) + "\n"
