"""Contracts and helpers that every other package builds on: errors, files, signals, seeds, and what
a data set (`view`, `spec`), a loss term (`terms`) and a sweep (`trial`) must offer.

Imports nothing of this project. Read `view.py` first.
"""
