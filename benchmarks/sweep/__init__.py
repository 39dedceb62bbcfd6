"""Benchmarks of the sweep engine with the real command, compared with what it replaces.

python -m benchmarks.sweep <name> [--small]
"""
