"""Stages of this system, in the order of a run: pretrain, extract, cluster, gate, experts, joint,
baselines, evaluate.

May import shared parts and the data, model and metrics of the system. Read `experts.py` first; it
uses `fits.py`, and the stages that decode clips share `decoding.py`.
"""
