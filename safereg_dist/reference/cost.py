"""Whether it pays to move risky rows to ranks that have fewer of them."""

from safereg_dist.parallel.hardware import Rates


def exchange_pays(
    *,
    rows_before: int,
    rows_after: int,
    passes_before: int,
    passes_after: int,
    tokens_per_row: float,
    moved_bytes: int,
    trunk_parameters: int,
    parameter_bytes: int,
    rates: Rates,
) -> bool:
    """True where the reference's pass gets shorter by more than the exchange takes.

        saved = (rows_before - rows_after) * 2 P tokens_per_row / flops_per_s
              + (passes_before - passes_after) * P parameter_bytes / link_bytes_per_s
        cost  = moved_bytes / link_bytes_per_s

    The ranks wait for the slowest one, whose rows are forwarded at 2 FLOPs per parameter and
    token; each pass that is no longer made is a gather of the trunk less. The start of a collective
    is not counted: an exchange has two of them, each pass one for every layer.

    Args:
        rows_before, rows_after: risky rows of the rank that has most, without and with exchange.
        passes_before, passes_after: passes that every rank makes.
        tokens_per_row: length of a risky row.
        moved_bytes: token ids there and hidden states back, of the rank that moves most.
        trunk_parameters: P, those used by one token. Of a mixture the active ones: its gathers are
            larger, so an exchange is told to pay too seldom, never too often.
        parameter_bytes: of one parameter of the reference, 2 in bf16.
        rates: the same on every rank, so that all decide alike.
    """
    shorter = (rows_before - rows_after) * 2 * trunk_parameters * tokens_per_row
    fewer = (passes_before - passes_after) * trunk_parameters * parameter_bytes
    saved = shorter / rates.flops_per_s + fewer / rates.link_bytes_per_s
    return saved > moved_bytes / rates.link_bytes_per_s
