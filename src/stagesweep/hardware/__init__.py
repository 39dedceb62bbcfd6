"""Hardware: detected devices, the resolved profile, out-of-memory retries, the micro-batch search,
throughput and the profiler.

Imports store, config and base. `detection`, `environment` and `numerics` import torch only where
they must. Read `profile.py` first.
"""
