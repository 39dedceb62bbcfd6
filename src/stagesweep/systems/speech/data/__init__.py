"""Recorded speech: tables of clips, audio, features, tokens and splits. Read `dataset.py` first."""
