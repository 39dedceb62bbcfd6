"""Agreement of predicted and true proportions."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class ProportionScores:
    """Scores of the output `proportions` (n, k) against the column `proportions`."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the arrays that the metric reads."""
        return ("proportions", "input/proportions")

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, float]:
        """Return ccc (of all values), ccc_type (mean over types) and mae; NaN without proportions.

        Types that are absent everywhere are left out of the mean.
        """
        predicted, true = (arrays.get(name) for name in self.reads)
        if predicted is None or true is None:
            return dict.fromkeys(("ccc", "ccc_type", "mae"), nan)
        types = np.flatnonzero(true.any(0))
        each = [concordance_correlation(true[:, k], predicted[:, k]) for k in types]
        defined = [value for value in each if not np.isnan(value)]
        return {
            "ccc": concordance_correlation(true.ravel(), predicted.ravel()),
            "ccc_type": float(np.mean(defined)) if defined else nan,
            "mae": float(np.abs(true - predicted).mean()),
        }


def concordance_correlation(true: Array, predicted: Array) -> float:
    """Lin's concordance correlation coefficient (1989) of two series (n,); 1 if they are equal.

    NaN for fewer than two values, and for two equal constants.
    """
    true, predicted = true.astype(np.float64), predicted.astype(np.float64)
    if len(true) < 2:
        return nan
    spread = true.var() + predicted.var() + (true.mean() - predicted.mean()) ** 2
    covariance = ((true - true.mean()) * (predicted - predicted.mean())).mean()
    return float(2 * covariance / spread) if spread > 0 else nan
