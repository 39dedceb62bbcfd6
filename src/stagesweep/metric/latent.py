"""Scores of a latent space: the number of active units."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def active_units(means: NDArray[np.floating], threshold: float = 0.01) -> int:
    """Number of latent dimensions whose posterior mean varies over the data by > `threshold`.

    `means` is (n, d). Burda et al. 2016, section 5.2; few active units mean posterior collapse.
    """
    return int((means.var(axis=0) > threshold).sum())


@dataclass
class ActiveUnits:
    """Active units of the model's `latent` output, for the metrics of a fit."""

    latent: str = "mean"
    threshold: float = 0.01

    def __call__(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, float]:
        """Return active_units."""
        return {"active_units": active_units(np.asarray(arrays[self.latent]), self.threshold)}
