"""Where the numbers of a run go: metrics.jsonl, TensorBoard and the progress bar.

May import store, config and base. Read `metric_log.py` first.
"""
