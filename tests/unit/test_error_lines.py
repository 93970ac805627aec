"""Claimed: the message of another library's error fits into ours and ends with a sentence, or says
that it was cut.

Exact.
"""

import pytest

from safereg_dist.errors import reason_of


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("Short.", "Short."),
        ("One is whole. The other is not", "One is whole."),
        ("one sentence that never ends", "one sentence ..."),
        ("x" * 40, "x" * 16 + " ..."),
    ],
)
def test_reasons_end_where_a_sentence_does(said, kept):
    assert reason_of(ValueError(said), 20) == kept
