"""Mean and confidence interval of a score over several seeds or folds."""

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit  # scipy.stats has it too, but takes a second to import


class Interval(NamedTuple):
    """A mean and its interval; `low` and `high` are NaN for fewer than two values."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean with Student's t-interval; NaN values are left out."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        mean = float(known[0]) if len(known) else nan
        return Interval(mean, nan, nan)
    mean = float(known.mean())
    error = known.std(ddof=1) / np.sqrt(len(known))
    half = float(error * stdtrit(len(known) - 1, (1 + confidence) / 2))
    return Interval(mean, mean - half, mean + half)
