"""Scores of predicted labels against hand-computed values and scikit-learn."""

import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from sklearn.metrics import f1_score

from stagesweep.metric.classification import (
    Classification,
    area_under_roc,
    calibration_error,
)

SHARES = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.3, 0.7, 0], [0.2, 0.8, 0], [0.0, 0.1, 0.9]])


def test_scores_of_predicted_labels() -> None:
    labels = np.array([0, 1, 1, 1, -1])
    found = Classification("kind")({"assignment": SHARES, "kind": labels})
    assert found["accuracy"] == 0.75
    predicted = SHARES[:4].argmax(1)
    assert found["macro_f1"] == pytest.approx(f1_score(labels[:4], predicted, average="macro"))
    # Four bins of one sample each: |1 - 0.9|, |0 - 0.6|, |1 - 0.7|, |1 - 0.8|.
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.3 + 0.2) / 4)


def test_confidence_equal_to_accuracy_is_calibrated() -> None:
    shares = np.tile([0.75, 0.25], (4, 1))
    assert calibration_error(np.array([0, 0, 0, 1]), shares) == pytest.approx(0)


def test_missing_arrays_and_labels_give_nan() -> None:
    kinds = np.array([0, 1, 1])
    assert all(map(math.isnan, Classification("kind")({"kind": kinds}).values()))
    unknown = {"assignment": SHARES[:3], "kind": np.full(3, -1)}
    assert all(map(math.isnan, Classification("kind")(unknown).values()))


def test_the_metric_names_the_arrays_that_it_reads() -> None:
    assert Classification("kind").reads == ("assignment", "kind")


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    """Mann and Whitney's U over all pairs of a label and the others, averaged over labels."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 60)
    shares = random.dirichlet(np.ones(3), 60)
    areas = [
        mannwhitneyu(shares[labels == k, k], shares[labels != k, k]).statistic
        / ((labels == k).sum() * (labels != k).sum())
        for k in range(3)
    ]
    assert area_under_roc(labels, shares) == pytest.approx(np.mean(areas))
    # A fourth label that nobody has is left out.
    more = np.hstack([shares, np.zeros((60, 1))])
    assert area_under_roc(labels, more) == pytest.approx(np.mean(areas))
