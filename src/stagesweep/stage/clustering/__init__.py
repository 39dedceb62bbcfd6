"""Stages of a clustering run: choose k, place the centres, baselines, evaluation, figures.

May import what ``stagesweep.stage`` may, and ``stage/plotting.py``. Read ``choose_clusters.py``
first: the files follow the order of the stages.
"""
