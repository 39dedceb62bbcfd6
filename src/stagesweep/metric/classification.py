"""Scores of predicted label probabilities.

Labels are codes (n,); samples with a label below 0 are left out. Undefined scores (no label, or an
array that a method does not give) are NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, roc_auc_score

Arrays = Mapping[str, NDArray[Any]]
BINS = 15


@dataclass
class Classification:
    """Scores of the probabilities `assignment` (n, k) against a label."""

    label: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Arrays that the metric reads."""
        return ("assignment", self.label)

    def __call__(self, arrays: Arrays) -> dict[str, float]:
        """Return accuracy, macro_f1 (over the labels present), ece and auroc."""
        known = arrays[self.label] >= 0
        if "assignment" not in arrays or not known.any():
            return dict.fromkeys(("accuracy", "macro_f1", "ece", "auroc"), nan)
        labels, shares = arrays[self.label][known], arrays["assignment"][known]
        predicted = shares.argmax(1)
        present = np.unique(labels)
        f1 = f1_score(labels, predicted, labels=present, average="macro", zero_division=0)
        scores = {"accuracy": float((predicted == labels).mean()), "macro_f1": float(f1)}
        calibrated = {"ece": calibration_error(labels, shares)}
        return scores | calibrated | {"auroc": area_under_roc(labels, shares)}


def area_under_roc(labels: NDArray[Any], shares: NDArray[Any]) -> float:
    """Area under the ROC curve of probabilities (n, k), one-vs-rest, averaged over labels.

    Labels that no sample or every sample has are left out; NaN if none remains.
    """
    kinds = [k for k in range(shares.shape[1]) if 0 < (labels == k).sum() < len(labels)]
    areas = [float(roc_auc_score(labels == kind, shares[:, kind])) for kind in kinds]
    return sum(areas) / len(areas) if areas else nan


def calibration_error(labels: NDArray[Any], shares: NDArray[Any]) -> float:
    """Expected calibration error of probabilities (n, k).

    The mean gap between confidence and accuracy over 15 bins of equal width (Guo et al. 2017,
    eq. 3).
    """
    confidence = shares.max(1)
    correct = shares.argmax(1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidence - correct.astype(float), BINS)
    return float(np.abs(gaps).sum() / len(labels))
