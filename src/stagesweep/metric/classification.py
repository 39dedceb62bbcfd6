"""How well labels are told, and how well a latent space separates them.

Labels are codes (n,); one below 0 means none, and that sample is left out. What is undefined (no
label, or arrays that a method does not give) is NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, roc_auc_score
from threadpoolctl import threadpool_limits

from stagesweep.metric import clustering
from stagesweep.metric.clustering import k_means

Arrays = Mapping[str, NDArray[Any]]
BINS = 15
# A random sample of this many stands for more: k-means is started again ten times.
ROWS = 5000


@dataclass
class Classification:
    """Scores of the probabilities `assignment` (n, k) against a label."""

    label: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The arrays it looks at."""
        return ("assignment", self.label)

    def __call__(self, arrays: Arrays) -> dict[str, float]:
        """Return accuracy, macro_f1 (over the labels there are), ece and auroc."""
        known = arrays[self.label] >= 0
        if "assignment" not in arrays or not known.any():
            return dict.fromkeys(("accuracy", "macro_f1", "ece", "auroc"), nan)
        labels, shares = arrays[self.label][known], arrays["assignment"][known]
        told = shares.argmax(1)
        there = np.unique(labels)
        f1 = f1_score(labels, told, labels=there, average="macro", zero_division=0)
        scores = {"accuracy": float((told == labels).mean()), "macro_f1": float(f1)}
        calibrated = {"ece": calibration_error(labels, shares)}
        return scores | calibrated | {"auroc": area_under_roc(labels, shares)}


def area_under_roc(labels: NDArray[Any], shares: NDArray[Any]) -> float:
    """Area under the ROC curve of probabilities (n, k): the mean over labels, each against all
    others; labels that are absent, or all there is, are left out, and NaN if none is left.
    """
    kinds = [k for k in range(shares.shape[1]) if 0 < (labels == k).sum() < len(labels)]
    areas = [float(roc_auc_score(labels == kind, shares[:, kind])) for kind in kinds]
    return sum(areas) / len(areas) if areas else nan


def calibration_error(labels: NDArray[Any], shares: NDArray[Any]) -> float:
    """Expected calibration error of probabilities (n, k): the mean distance of confidence and
    accuracy over 15 bins of equal width (Guo et al. 2017, eq. 3).
    """
    sure = shares.max(1)
    right = shares.argmax(1) == labels
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, sure - right.astype(float), BINS)
    return float(np.abs(gaps).sum() / len(labels))


@dataclass
class Clusters:
    """Scores against a label of the clusters that `assignment` (n, k) is largest for: how well
    kinds are found that nobody has told.
    """

    label: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The arrays it looks at."""
        return ("assignment", self.label)

    def __call__(self, arrays: Arrays) -> dict[str, float]:
        """Return cluster_acc, cluster_nmi, cluster_ari and cluster_purity."""
        if "assignment" not in arrays:
            return dict.fromkeys((f"cluster_{n}" for n in ("acc", "nmi", "ari", "purity")), nan)
        scores = clustering.external(arrays[self.label], arrays["assignment"].argmax(1))
        return {f"cluster_{name}": score for name, score in scores.items()}


@dataclass
class LatentClusters:
    """Scores of k-means on `mean` (n, d) against a label, with as many clusters as it has kinds."""

    label: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The arrays it looks at."""
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
        return {"ari": clustering.ari(labels, clusters), "nmi": clustering.nmi(labels, clusters)}
