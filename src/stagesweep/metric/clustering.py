"""Scores of a clustering: against labels (external), by geometry (internal), between repeats.

Labels and clusters are integer arrays (n,); samples with a label below 0 are left out. Undefined
scores (no label, one cluster) are NaN, never 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import (
    adjusted_rand_score,
    calinski_harabasz_score,
    davies_bouldin_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.metrics.cluster import contingency_matrix
from threadpoolctl import threadpool_limits

from stagesweep.metric.k_means import k_means

Labels = NDArray[np.integer]
Points = NDArray[np.floating]
Arrays = Mapping[str, NDArray[Any]]
# Of more samples, k-means is fitted to a random sample of this many.
ROWS = 5000


def accuracy(labels: Labels, clusters: Labels) -> float:
    """Accuracy under the best one-to-one match of clusters to labels.

    Found by the Hungarian method (Kuhn 1955); Xie et al. 2016, eq. 10.
    """
    table = _contingency(labels, clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return _share(table[rows, columns].sum(), table)


def purity(labels: Labels, clusters: Labels) -> float:
    """Share of samples that have the most frequent label of their cluster."""
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
    """All scores against labels: acc, nmi, ari, purity."""
    return {
        "acc": accuracy(labels, clusters),
        "nmi": nmi(labels, clusters),
        "ari": ari(labels, clusters),
        "purity": purity(labels, clusters),
    }


def silhouette(points: Points, clusters: Labels, *, sample: int = 5000, seed: int = 0) -> float:
    """Mean silhouette (Rousseeuw 1987) of points (n, d), in [-1, 1].

    Needs all pairwise distances, so with more than `sample` points a seeded sample is scored.
    """
    rows = np.arange(len(points))
    if len(rows) > sample:
        rows = np.random.default_rng(seed).choice(rows, sample, replace=False)
    if not _partitioned(clusters[rows]):
        return nan
    return float(silhouette_score(points[rows], clusters[rows]))


def davies_bouldin(points: Points, clusters: Labels) -> float:
    """Davies-Bouldin index of points (n, d): mean overlap of close clusters, lower is better."""
    return float(davies_bouldin_score(points, clusters)) if _partitioned(clusters) else nan


def calinski_harabasz(points: Points, clusters: Labels) -> float:
    """Calinski-Harabasz index of points (n, d): between/within variance, higher is better."""
    return float(calinski_harabasz_score(points, clusters)) if _partitioned(clusters) else nan


def internal(points: Points, clusters: Labels) -> dict[str, float]:
    """All scores without labels: silhouette, davies_bouldin, calinski_harabasz."""
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
    """Internal scores of the model's clustering, and external ones with a `label` column.

    Reads `assignment` (n, k) and `latent` (n, d).
    """

    label: str | None = None
    latent: str = "mean"

    def __call__(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, float]:
        """Return silhouette, davies_bouldin, calinski_harabasz, clusters (the number in use)."""
        clusters = np.asarray(arrays["assignment"]).argmax(axis=1)
        scores = internal(np.asarray(arrays[self.latent]), clusters)
        scores["clusters"] = float(len(np.unique(clusters)))
        if self.label is not None:
            scores |= external(np.asarray(arrays[self.label]), clusters)
        return scores


@dataclass
class ExternalClusterScores:
    """Scores of the clusters with the largest `assignment` (n, k) against a label.

    For labels that the model was not trained on.
    """

    label: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Arrays that the metric reads."""
        return ("assignment", self.label)

    def __call__(self, arrays: Arrays) -> dict[str, float]:
        """Return cluster_acc, cluster_nmi, cluster_ari and cluster_purity."""
        if "assignment" not in arrays:
            return dict.fromkeys((f"cluster_{n}" for n in ("acc", "nmi", "ari", "purity")), nan)
        scores = external(arrays[self.label], arrays["assignment"].argmax(1))
        return {f"cluster_{name}": score for name, score in scores.items()}


@dataclass
class LatentKMeans:
    """Scores of k-means on `mean` (n, d) against a label, with one cluster per label value."""

    label: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Arrays that the metric reads."""
        return ("mean", self.label)

    def __call__(self, arrays: Arrays) -> dict[str, float]:
        """Return ari and nmi."""
        rows = np.flatnonzero(arrays[self.label] >= 0)
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:ROWS])
        labels = arrays[self.label][rows]
        kinds = len(np.unique(labels))
        if "mean" not in arrays or kinds < 2:
            return dict.fromkeys(("ari", "nmi"), nan)
        with threadpool_limits(limits=1):
            clusters = k_means(arrays["mean"][rows], kinds, 0).labels_
        return {"ari": ari(labels, clusters), "nmi": nmi(labels, clusters)}


def _contingency(labels: Labels, clusters: Labels) -> NDArray[np.int64]:
    """Counts (labels, clusters) over the labelled samples."""
    known = labels >= 0
    table: NDArray[np.int64] = contingency_matrix(labels[known], clusters[known])
    return table


def _share(count: int, table: NDArray[np.int64]) -> float:
    return float(count / table.sum()) if table.size else nan


def _partitioned(clusters: Labels) -> bool:
    """Whether the geometric scores are defined: at least two clusters, and not all singletons."""
    return 2 <= len(np.unique(clusters)) < len(clusters)
