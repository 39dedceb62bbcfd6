"""How well proportions of a mixture are told."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class Proportions:
    """Scores of the output `proportions` (n, k) against the column of that name."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The arrays it looks at."""
        return ("proportions", "input/proportions")

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, float]:
        """Return ccc (of all values), ccc_type (mean over types) and mae; NaN without proportions.

        A type that is absent everywhere is left out of the mean.
        """
        told, true = (arrays.get(name) for name in self.reads)
        if told is None or true is None:
            return dict.fromkeys(("ccc", "ccc_type", "mae"), nan)
        there = true.any(0)
        types = [concordance(true[:, k], told[:, k]) for k in np.flatnonzero(there)]
        known = [value for value in types if not np.isnan(value)]
        return {
            "ccc": concordance(true.ravel(), told.ravel()),
            "ccc_type": float(np.mean(known)) if known else nan,
            "mae": float(np.abs(true - told).mean()),
        }


def concordance(true: Array, told: Array) -> float:
    """Lin's concordance correlation coefficient (1989) of two series (n,): 1 where they are equal.

    NaN for less than two values, and for two equal constants.
    """
    true, told = true.astype(np.float64), told.astype(np.float64)
    if len(true) < 2:
        return nan
    spread = true.var() + told.var() + (true.mean() - told.mean()) ** 2
    shared = ((true - true.mean()) * (told - told.mean())).mean()
    return float(2 * shared / spread) if spread > 0 else nan
