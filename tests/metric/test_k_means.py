import numpy as np

from stagesweep.metric.k_means import k_means


def test_fewer_distinct_points_than_clusters_gives_a_fit() -> None:
    fit = k_means(np.array([[0.0], [0.0], [1.0]]), 3, seed=0)
    assert fit.inertia_ == 0
