"""Evaluation: answers of a model, their judges, the figures of merit, and the report.

`generate` answers prompts in batches, `judges` tell refusals from answers, `evaluate` turns both
into one JSON file, `report` shows runs side by side. Nothing heavy is imported
here, so that a report does not load transformers.
"""
