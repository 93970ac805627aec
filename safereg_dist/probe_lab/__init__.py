"""Fitting activation probes: collect hidden states, fit a layer each, calibrate, choose."""
