"""stagesweep: Hydra-composed sweeps of multi-stage PyTorch training.

Modules import those of lower layers only; docs/architecture.md has the map. Read cli.py first, then
run/ for one run and sweep/ for many.
"""

__version__ = "0.1.0"
