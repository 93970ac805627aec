"""Aligned text: the one way in which figures are shown in a terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[object]], *, left: int = 1, widest: int = 0) -> list[str]:
    """A line for each row of cells, all columns aligned, the first `left` of them to the left.

    A cell of more than `widest` characters (0: any number) does not widen its column.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    if widest:
        widths = [min(width, widest) for width in widths]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    ]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under the names of their columns, indented under a title."""
    return "\n".join([title, *(f"  {line}" for line in aligned([columns, *rows]))])


def gigabytes(size: float) -> str:
    """Bytes as text, three digits or more."""
    return f"{size / 1e9:,.3g} GB" if size < 9.995e11 else f"{size / 1e9:,.0f} GB"
