"""The report of runs side by side: `reading` what they leave behind, tables and `plots` of it, and
the `page` that holds them."""

from safereg_dist.evaluate.report.page import write_report

__all__ = ["write_report"]
