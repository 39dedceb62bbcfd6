"""Log-normalisation of counts."""

from torch import Tensor


def log_normalise(counts: Tensor, library: Tensor) -> Tensor:
    """Return log(1 + counts per 10,000) of counts (B, g) with library sizes (B, 1)."""
    return (counts * (1e4 / library)).log1p()
