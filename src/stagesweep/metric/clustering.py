"""How good a clustering is: against labels, by its own geometry, and between repeats.

Labels and clusters are integer arrays (n,); a label below 0 means none, and that sample is left
out. Whatever is undefined (no label, one cluster) is NaN, never 0.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import nan

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import (
    adjusted_rand_score,
    calinski_harabasz_score,
    davies_bouldin_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.metrics.cluster import contingency_matrix

Labels = NDArray[np.integer]
Points = NDArray[np.floating]


def accuracy(labels: Labels, clusters: Labels) -> float:
    """Share of samples right under the best one-to-one match of clusters to labels.

    The match is the Hungarian assignment (Kuhn 1955); Xie et al. 2016, eq. 10.
    """
    table = _contingency(labels, clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return _share(table[rows, columns].sum(), table)


def purity(labels: Labels, clusters: Labels) -> float:
    """Share of samples that carry the commonest label of their cluster."""
    table = _contingency(labels, clusters)
    return _share(table.max(axis=0, initial=0).sum(), table)


def nmi(labels: Labels, clusters: Labels) -> float:
    """Normalised mutual information (arithmetic mean of the entropies)."""
    known = labels >= 0
    if not known.any():
        return nan
    return float(normalized_mutual_info_score(labels[known], clusters[known]))


def ari(labels: Labels, clusters: Labels) -> float:
    """Adjusted Rand index: 0 for chance, 1 for the same partition (Hubert & Arabie 1985)."""
    known = labels >= 0
    return float(adjusted_rand_score(labels[known], clusters[known])) if known.any() else nan


def external(labels: Labels, clusters: Labels) -> dict[str, float]:
    """Every score against labels: acc, nmi, ari, purity."""
    return {
        "acc": accuracy(labels, clusters),
        "nmi": nmi(labels, clusters),
        "ari": ari(labels, clusters),
        "purity": purity(labels, clusters),
    }


def silhouette(points: Points, clusters: Labels, *, sample: int = 5000, seed: int = 0) -> float:
    """Mean silhouette (Rousseeuw 1987) of points (n, d), in [-1, 1].

    It needs all pairwise distances, so above `sample` points a seeded sample stands for all.
    """
    rows = np.arange(len(points))
    if len(rows) > sample:
        rows = np.random.default_rng(seed).choice(rows, sample, replace=False)
    if not _partitioned(clusters[rows]):
        return nan
    return float(silhouette_score(points[rows], clusters[rows]))


def davies_bouldin(points: Points, clusters: Labels) -> float:
    """Davies-Bouldin index of points (n, d): mean overlap of neighbouring clusters, low is good."""
    return float(davies_bouldin_score(points, clusters)) if _partitioned(clusters) else nan


def calinski_harabasz(points: Points, clusters: Labels) -> float:
    """Calinski-Harabasz index of points (n, d): between over within variance, high is good."""
    return float(calinski_harabasz_score(points, clusters)) if _partitioned(clusters) else nan


def internal(points: Points, clusters: Labels) -> dict[str, float]:
    """Every score that needs no label: silhouette, davies_bouldin, calinski_harabasz."""
    return {
        "silhouette": silhouette(points, clusters),
        "davies_bouldin": davies_bouldin(points, clusters),
        "calinski_harabasz": calinski_harabasz(points, clusters),
    }


def stability(repeats: Sequence[Labels]) -> list[float]:
    """ARI of every pair of clusterings of the same samples, (0,1), (0,2), ..., (1,2), ..."""
    return [ari(first, second) for first, second in combinations(repeats, 2)]


@dataclass
class ClusterScores:
    """Scores of the model's clustering, for the metrics of a fit.

    Reads `assignment` (n, k) and `latent` (n, d); with a `label` column, the scores against it too.
    """

    label: str | None = None
    latent: str = "mean"

    def __call__(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, float]:
        """Return silhouette, davies_bouldin, calinski_harabasz, clusters (how many are in use)."""
        clusters = np.asarray(arrays["assignment"]).argmax(axis=1)
        scores = internal(np.asarray(arrays[self.latent]), clusters)
        scores["clusters"] = float(len(np.unique(clusters)))
        if self.label is not None:
            scores |= external(np.asarray(arrays[self.label]), clusters)
        return scores


def _contingency(labels: Labels, clusters: Labels) -> NDArray[np.int64]:
    """Counts (labels, clusters) over the samples that have a label."""
    known = labels >= 0
    table: NDArray[np.int64] = contingency_matrix(labels[known], clusters[known])
    return table


def _share(count: int, table: NDArray[np.int64]) -> float:
    return float(count / table.sum()) if table.size else nan


def _partitioned(clusters: Labels) -> bool:
    """Whether the geometric scores are defined: at least two clusters, and not all singletons."""
    return 2 <= len(np.unique(clusters)) < len(clusters)


def k_means(points: Points, k: int, seed: int, n_init: int = 10, max_iter: int = 300) -> KMeans:
    """Best of `n_init` k-means fits to points (n, d)."""
    with warnings.catch_warnings():
        # Fewer distinct points than clusters: some clusters stay empty, and the scores show it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = KMeans(k, n_init=n_init, max_iter=max_iter, random_state=seed % 2**32)
        return fit.fit(points.astype(np.float64))
