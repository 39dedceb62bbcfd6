"""Sweeps: what happens around the trials, and their results."""
