"""Scores of told labels and of latent spaces, by hand and by scikit-learn."""

import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score

from stagesweep.metric.classification import (
    Classification,
    Clusters,
    LatentClusters,
    area_under_roc,
    calibration_error,
)

SHARES = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.3, 0.7, 0], [0.2, 0.8, 0], [0.0, 0.1, 0.9]])


def test_labels_that_are_told() -> None:
    labels = np.array([0, 1, 1, 1, -1])
    found = Classification("kind")({"assignment": SHARES, "kind": labels})
    assert found["accuracy"] == 0.75
    told = SHARES[:4].argmax(1)
    assert found["macro_f1"] == pytest.approx(f1_score(labels[:4], told, average="macro"))
    # Four bins of one sample each: |1 - 0.9|, |0 - 0.6|, |1 - 0.7|, |1 - 0.8|.
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.3 + 0.2) / 4)


def test_who_is_as_sure_as_right_is_calibrated() -> None:
    shares = np.tile([0.75, 0.25], (4, 1))
    assert calibration_error(np.array([0, 0, 0, 1]), shares) == pytest.approx(0)


def test_a_latent_space_that_separates_kinds() -> None:
    points, kinds = make_blobs(200, 5, centers=3, cluster_std=0.1, random_state=0)
    assert LatentClusters("kind")({"mean": points, "kind": kinds})["ari"] == 1
    shuffled = np.random.default_rng(0).permutation(kinds)
    assert LatentClusters("kind")({"mean": points, "kind": shuffled})["ari"] < 0.1


def test_kinds_that_were_found_may_have_other_numbers() -> None:
    random = np.random.default_rng(0)
    kinds = random.integers(0, 3, 90)
    renamed = np.array([2, 0, 1])[kinds]
    found = Clusters("kind")({"assignment": np.eye(4)[renamed], "kind": kinds})
    assert found == dict.fromkeys(
        ("cluster_acc", "cluster_nmi", "cluster_ari", "cluster_purity"), pytest.approx(1)
    )
    shares = random.dirichlet(np.ones(4), 90)
    kinds[:5] = -1
    found = Clusters("kind")({"assignment": shares, "kind": kinds})
    given = kinds[5:], shares.argmax(1)[5:]
    assert found["cluster_ari"] == pytest.approx(adjusted_rand_score(*given))
    assert found["cluster_nmi"] == pytest.approx(normalized_mutual_info_score(*given))


def test_what_a_method_does_not_give_is_undefined() -> None:
    kinds = np.array([0, 1, 1])
    assert all(map(math.isnan, Classification("kind")({"kind": kinds}).values()))
    assert all(map(math.isnan, LatentClusters("kind")({"kind": kinds}).values()))
    assert all(map(math.isnan, Clusters("kind")({"kind": kinds}).values()))
    unknown = {"assignment": SHARES[:3], "mean": SHARES[:3], "kind": np.full(3, -1)}
    assert all(map(math.isnan, Classification("kind")(unknown).values()))
    assert all(map(math.isnan, Clusters("kind")(unknown).values()))
    assert all(map(math.isnan, LatentClusters("kind")(unknown).values()))


def test_they_say_what_they_read() -> None:
    assert Classification("kind").reads == Clusters("kind").reads == ("assignment", "kind")
    assert LatentClusters("kind").reads == ("mean", "kind")


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
