"""Counts as log-normalised values."""

from torch import Tensor


def normalised(counts: Tensor, library: Tensor) -> Tensor:
    """Counts (B, g) as if each cell had 10,000, their logarithm."""
    return (counts * (1e4 / library)).log1p()
