"""The sweep engine by the real command, beside what it replaces. One file a benchmark.

python -m benchmarks.sweep <name> [--small]
"""
