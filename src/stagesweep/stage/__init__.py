"""Stages that know no domain: small classes with ``__call__(run) -> dict[str, float]``.

May import ``metric``, ``loss``, ``model``, ``data``, ``core`` and the layers below them; the run
comes in as an argument. Read ``fit.py`` first, then ``score.py``; ``clustering/`` has the stages of
a clustering run.
"""
