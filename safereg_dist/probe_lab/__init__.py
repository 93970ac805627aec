"""The probe laboratory: `safereg probe fit | sweep | evaluate`, and probes applied to raw rows.

options.py    the options of a fit or a sweep
job.py        rows.py, background.py, behaviour.py (labels from the model's own refusals) ->
              split.py (near_duplicates.py) -> collect.py, store.py: states of all layers on disk
layer_fit.py  one probe: classifiers.py (logistic.py, mlp.py), calibration.py, threshold.py,
              scores.py
fit.py, sweep.py, evaluate.py, apply.py    the verbs; figures.py, tables.py show their results
"""
