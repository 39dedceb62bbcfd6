"""Search spaces: the grammar, parameters and points, and the config of each trial.

Imports config and base, and nothing else of `sweep`. Read `space.py` first, then `grammar.py`.
"""
