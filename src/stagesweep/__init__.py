"""stagesweep: Hydra-composed sweeps of multi-stage PyTorch training."""

__version__ = "0.1.0"
