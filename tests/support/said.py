"""What a verb said on stderr, without what it says beside its errors."""

import re

_ASIDE = re.compile(
    r"\d+%\||\d+ ?[a-z]* ?\[\d\d:\d\d"  # bars
    r"|^[^:]+: [\d,.]+[kM]?/[\d,.?]+[kM]?, .* left"  # the lines in their place
    r"|^now: |^(audit|plan|probe|train): (loads|reads|works out|draws) "
    r"|rows without a label|known from before|are empty, which|^eval: "  # notes of `eval`
)


def without_asides(text: str) -> list[str]:
    """The lines, but for bars, what a verb does, notes and the next step."""
    return [x for x in re.split("[\r\n]+", text) if x.strip() and not _ASIDE.search(x)]
