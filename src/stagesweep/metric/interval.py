"""A figure from several seeds: its mean and how sure it is."""

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and the interval around it; `low` and `high` are NaN for fewer than two values."""

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
    half = float(stats.sem(known) * stats.t.ppf((1 + confidence) / 2, len(known) - 1))
    return Interval(mean, mean - half, mean + half)
