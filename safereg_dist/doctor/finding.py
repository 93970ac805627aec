"""What a check has found, and how it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from safereg_dist.screen.table import aligned

Verdict = Literal["ok", "warn", "FAIL"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


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
    lines = []
    for line, each in zip(aligned(cells, left=4, widest=60), (None, *findings), strict=True):
        lines.append(line)
        if each is not None and each.remedy:
            lines.append(f"{'':{max(map(len, VERDICTS))}}  -> {each.remedy}")
    return "\n".join(lines) + "\n"
