"""Metrics that know no domain: arrays of a whole split in, ``dict[str, float]`` out.

May import ``model``, ``data``, ``core`` and the layers below them, and no stage. Undefined scores
are NaN. Read ``clustering.py`` first.
"""
