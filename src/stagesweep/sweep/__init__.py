"""Sweeps: Hydra's plugins, and the four packages behind them: engine, report, study and space.

Each of them imports only those that follow it in this list, and the packages below the sweep.
Read ``plugin.py`` first, then ``engine/controller.py``.
"""
