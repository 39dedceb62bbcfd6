"""The record of a sweep on disk: its Optuna study and its manifest, and who may write them.

Imports `sweep.space`, store, config and base. Read `study.py` first, then `storage.py`.
"""
