"""k-means, for metrics and stages."""

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning


def k_means(
    points: NDArray[np.floating], k: int, seed: int, n_init: int = 10, max_iter: int = 300
) -> KMeans:
    """Best of `n_init` k-means fits to points (n, d)."""
    with warnings.catch_warnings():
        # With fewer distinct points than clusters some clusters are empty; the scores show it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = KMeans(k, n_init=n_init, max_iter=max_iter, random_state=seed % 2**32)
        return fit.fit(points.astype(np.float64))
