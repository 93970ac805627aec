"""The report of runs side by side: `reading` what they leave behind, tables and figures of it, the
`page` that holds them, and a section for a model card."""

from safereg_dist.evaluate.report.model_card import write_model_card
from safereg_dist.evaluate.report.page import write_report

__all__ = ["write_model_card", "write_report"]
