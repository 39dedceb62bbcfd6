"""Clusters: one for each expert, and the handling of too few."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from stagesweep.base.errors import UserError
from stagesweep.systems.speech.stage import cluster as module
from stagesweep.systems.speech.stage.cluster import Cluster, Clustering, Projection


def clouds(run: Any, clouds: int, n: int = 120, spread: float = 0.5) -> np.ndarray:
    """Save vectors in clouds as an extraction does; returns the cloud of each."""
    points, kinds = make_blobs(n, 6, centers=clouds, cluster_std=spread, random_state=2)
    np.save(run.file("pooled.npy"), points.astype(np.float32))
    split = np.where(np.arange(n) % 4 == 3, "val", "train")
    table = {"split": split, "row": np.arange(n), "id": "x", "speaker": "s", "stratum": kinds}
    run.save("extracted.csv", pd.DataFrame(table))
    return np.asarray(kinds)


@pytest.mark.parametrize("method", ["hdbscan", "spectral"])
@pytest.mark.parametrize("reduce", ["none", "pca"])
def test_clouds_are_found(speech_run: Any, method: Any, reduce: Any) -> None:
    run = speech_run()
    kinds = clouds(run, 4)
    stage = Cluster(method=method, reduce=reduce, dim=3)
    metrics = stage(run)
    assert set(metrics) == stage.metric_names()
    assert (metrics["clusters"], metrics["stratum_ari"]) == (4, 1)
    table = run.load("clusters.csv")
    assert adjusted_rand_score(kinds, table["cluster"]) == 1, "val is assigned, too"
    sizes = table.loc[table["split"] == "train", "cluster"].value_counts()
    assert sizes.sort_index().is_monotonic_decreasing, "the largest is number 0"
    soft = run.load("clusters.npz")["soft"]
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-5)
    assert (soft.argmax(1) == table["cluster"]).all()


def test_more_clusters_than_experts_are_merged(speech_run: Any) -> None:
    run = speech_run()
    kinds = clouds(run, 9, spread=0.2)
    assert Cluster()(run)["clusters"] == 4
    table = run.load("clusters.csv")
    pure = pd.crosstab(kinds, table["cluster"]).gt(0).sum(axis=1)
    assert (pure == 1).all(), "no cloud is divided"


def test_sizes_are_lowered_until_there_are_enough(
    speech_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = speech_run()
    clouds(run, 4)
    tried = []
    real = module.HDBSCAN

    def spy(min_cluster_size: int, **settings: Any) -> Any:
        tried.append(min_cluster_size)
        return real(min_cluster_size=min_cluster_size, **settings)

    monkeypatch.setattr(module, "HDBSCAN", spy)
    assert Cluster(min_cluster_size=40)(run)["clusters"] == 4
    assert tried[0] == 40
    assert tried == sorted(tried, reverse=True)
    assert 2 < tried[-1] <= 30, "the largest size that is sufficient"


def test_too_few_clusters_shrink_fail_or_fall_back(speech_run: Any) -> None:
    run = speech_run(number=1)
    clouds(run, 2)
    assert Cluster(min_cluster_size=30)(run)["clusters"] in (2, 3, 4)
    message = (
        r"HDBSCAN finds \d clusters for 4 experts with every min_cluster_size from 5 to 2; set"
    )
    points = np.repeat([[0.0] * 6, [9.0] * 6], 60, axis=0)
    np.save(run.file("pooled.npy"), points.astype(np.float32))
    with pytest.raises(UserError, match=message):
        Cluster(fewer="fail", reduce="none")(run)
    assert Cluster(fewer="spectral", reduce="none")(run)["clusters"] >= 2
    metrics = Cluster(fewer="shrink", reduce="none")(run)
    assert metrics["clusters"] == 2
    assert run.model.gate.active.tolist() == [True, True, False, False]
    assert run._entry.path.joinpath("weights.pt").exists()
    assert (run.load("clusters.npz")["soft"][:, 2:] == 0).all()


def test_fewer_clips_than_experts_are_an_error(speech_run: Any) -> None:
    run = speech_run()
    clouds(run, 1, n=4)
    with pytest.raises(UserError, match=r"stage.it: 3 clips are too few for 4 clusters; extract"):
        Cluster()(run)


def test_random_clusters_are_independent_of_the_clips(speech_run: Any) -> None:
    run = speech_run()
    clouds(run, 4)
    metrics = Cluster(method="random")(run)
    assert metrics["clusters"] == 4
    assert abs(metrics["stratum_ari"]) < 0.1
    assert metrics["smallest"] > 0.2


def test_other_clips_are_assigned_to_the_nearest_cluster() -> None:
    points, kinds = make_blobs(80, 5, centers=3, cluster_std=0.3, random_state=1)
    projection = Projection.fit(points[:40], 3)
    found = Clustering.fit(projection, projection.points(points[:40]), kinds[:40], 4, 0.5)
    again = Clustering.from_arrays(found.arrays())
    cluster, shares = again.assign(points)
    assert adjusted_rand_score(cluster, kinds) == 1
    assert shares.shape == (80, 4)
    assert (shares[:, 3] == 0).all()


def test_a_cluster_that_is_not_round_keeps_its_clips() -> None:
    """Of two parallel rods, some points are nearer to the mean of the other."""
    along = np.linspace(0, 20, 60)
    rods = [np.stack([along + shift, np.full(60, y)], axis=1) for shift, y in ((0, 0), (12, 3))]
    points, labels = np.concatenate(rods), np.repeat([0, 1], 60)
    projection = Projection.fit(points, None)
    clustering = Clustering.fit(projection, projection.points(points), labels, 2, 0.5)
    assigned, _ = clustering.assign(points)
    assert (assigned == labels).all() or (assigned == 1 - labels).all()
