"""Stages of this system: preprocessing, baselines of cell types, pseudobulks.

May import shared parts and the system's normalisation, but no model. Read `pseudobulk.py` first.
"""
