"""Clustering scores against brute force and the definitions."""

from itertools import permutations
from math import isnan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from stagesweep.metric.clustering import (
    ClusterScores,
    ExternalClusterScores,
    LatentKMeans,
    accuracy,
    ari,
    calinski_harabasz,
    davies_bouldin,
    external,
    internal,
    nmi,
    purity,
    silhouette,
    stability,
)

four_labels = arrays(np.int64, 30, elements=st.integers(-1, 3))
four_clusters = arrays(np.int64, 30, elements=st.integers(0, 3))


@settings(max_examples=30, deadline=None)
@given(four_labels, four_clusters)
def test_accuracy_is_the_best_of_all_matches(labels, clusters):
    known = labels >= 0
    if not known.any():
        assert isnan(accuracy(labels, clusters))
        return
    best = max(
        np.mean(np.array(match)[clusters[known]] == labels[known])
        for match in permutations(range(4))
    )
    assert accuracy(labels, clusters) == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(four_labels, four_clusters)
def test_ari_counts_pairs(labels, clusters):
    known = labels >= 0
    if known.sum() < 2:
        return
    upper = np.triu_indices(known.sum(), 1)
    same_label = (labels[known][:, None] == labels[known])[upper]
    same_cluster = (clusters[known][:, None] == clusters[known])[upper]
    both = (same_label & same_cluster).sum()
    expected = same_label.sum() * same_cluster.sum() / len(same_label)
    largest = (same_label.sum() + same_cluster.sum()) / 2
    score = 1.0 if largest == expected else (both - expected) / (largest - expected)
    assert ari(labels, clusters) == pytest.approx(score)


def test_nmi_and_purity_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 1, 2, -1])
    clusters = np.array([0, 0, 1, 1, 1, 1, 1, 0])
    joint = np.array([[2, 1], [0, 3], [0, 1]]) / 7
    of_labels, of_clusters = entropy(joint.sum(1)), entropy(joint.sum(0))
    mutual = of_labels + of_clusters - entropy(joint.ravel())
    assert nmi(labels, clusters) == pytest.approx(2 * mutual / (of_labels + of_clusters))
    assert purity(labels, clusters) == pytest.approx((2 + 3) / 7)


def test_a_relabelled_truth_is_perfect_and_an_absent_one_is_nan():
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert external(labels, (labels + 1) % 3) == pytest.approx(
        {"acc": 1, "nmi": 1, "ari": 1, "purity": 1}
    )
    assert all(isnan(score) for score in external(np.full(6, -1), labels).values())


def test_internal_scores_against_their_definitions():
    generator = np.random.default_rng(0)
    clusters = np.repeat([0, 1, 2], [20, 15, 10])
    points = generator.normal(size=(45, 3)) + clusters[:, None]
    own = [points[clusters == c] for c in range(3)]
    centres = np.stack([rows.mean(0) for rows in own])

    to = np.stack([cdist(points, rows).sum(1) for rows in own], 1)
    sizes = np.bincount(clusters)
    inside = to[np.arange(45), clusters] / (sizes[clusters] - 1)
    others = to / sizes
    others[np.arange(45), clusters] = np.inf
    outside = others.min(1)
    expected = ((outside - inside) / np.maximum(outside, inside)).mean()
    assert silhouette(points, clusters) == pytest.approx(expected)

    spread = np.array(
        [cdist(rows, centre[None]).mean() for rows, centre in zip(own, centres, strict=True)]
    )
    between = cdist(centres, centres) + np.diag([np.inf] * 3)
    worst = ((spread[:, None] + spread) / between).max(1)
    assert davies_bouldin(points, clusters) == pytest.approx(worst.mean())

    within = sum(((rows - centre) ** 2).sum() for rows, centre in zip(own, centres, strict=True))
    apart = (sizes[:, None] * (centres - points.mean(0)) ** 2).sum()
    assert calinski_harabasz(points, clusters) == pytest.approx((apart / 2) / (within / 42))


def test_one_cluster_has_no_internal_scores():
    points = np.random.default_rng(0).normal(size=(9, 2))
    assert all(isnan(score) for score in internal(points, np.zeros(9, dtype=int)).values())
    assert all(isnan(score) for score in internal(points, np.arange(9)).values())


def test_a_sampled_silhouette_is_seeded_and_near_the_whole():
    generator = np.random.default_rng(1)
    clusters = generator.integers(3, size=3000)
    points = generator.normal(size=(3000, 2)) + 3 * clusters[:, None]
    sampled = silhouette(points, clusters, sample=800)
    assert sampled == silhouette(points, clusters, sample=800)
    assert sampled != silhouette(points, clusters, sample=800, seed=1)
    assert sampled == pytest.approx(silhouette(points, clusters), abs=0.03)


def test_stability_compares_every_pair():
    first = np.array([0, 0, 1, 1])
    assert stability([first, 1 - first, np.zeros(4, dtype=int)]) == pytest.approx([1, 0, 0])


def test_cluster_scores_read_the_arrays_of_a_split():
    clusters = np.repeat([0, 2], 10)
    arrays = {
        "assignment": np.eye(3)[clusters],
        "mean": np.random.default_rng(0).normal(size=(20, 2)) + 9 * clusters[:, None],
        "digit": clusters,
    }
    scores = ClusterScores()(arrays)
    assert set(scores) == {"silhouette", "davies_bouldin", "calinski_harabasz", "clusters"}
    assert scores["clusters"] == 2
    assert ClusterScores(label="digit")(arrays)["acc"] == 1


def test_k_means_finds_the_labels_of_a_latent_space_that_separates_them() -> None:
    points, kinds = make_blobs(200, 5, centers=3, cluster_std=0.1, random_state=0)
    assert LatentKMeans("kind")({"mean": points, "kind": kinds})["ari"] == 1
    shuffled = np.random.default_rng(0).permutation(kinds)
    assert LatentKMeans("kind")({"mean": points, "kind": shuffled})["ari"] < 0.1


def test_cluster_numbers_need_not_match_label_codes() -> None:
    random = np.random.default_rng(0)
    kinds = random.integers(0, 3, 90)
    renamed = np.array([2, 0, 1])[kinds]
    found = ExternalClusterScores("kind")({"assignment": np.eye(4)[renamed], "kind": kinds})
    assert found == dict.fromkeys(
        ("cluster_acc", "cluster_nmi", "cluster_ari", "cluster_purity"), pytest.approx(1)
    )
    shares = random.dirichlet(np.ones(4), 90)
    kinds[:5] = -1
    found = ExternalClusterScores("kind")({"assignment": shares, "kind": kinds})
    given = kinds[5:], shares.argmax(1)[5:]
    assert found["cluster_ari"] == pytest.approx(adjusted_rand_score(*given))
    assert found["cluster_nmi"] == pytest.approx(normalized_mutual_info_score(*given))


@pytest.mark.parametrize("metric", [ExternalClusterScores("kind"), LatentKMeans("kind")])
def test_missing_arrays_and_labels_give_nan(metric: ExternalClusterScores | LatentKMeans) -> None:
    given = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    assert all(map(isnan, metric({"kind": np.array([0, 1, 1])}).values()))
    unknown = {"assignment": given, "mean": given, "kind": np.full(3, -1)}
    assert all(map(isnan, metric(unknown).values()))


def test_metrics_name_the_arrays_that_they_read() -> None:
    assert ExternalClusterScores("kind").reads == ("assignment", "kind")
    assert LatentKMeans("kind").reads == ("mean", "kind")
