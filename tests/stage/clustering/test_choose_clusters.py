import logging
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score, silhouette_score

from stagesweep.base.errors import UserError
from stagesweep.metric.k_means import k_means
from stagesweep.stage.clustering.choose_clusters import (
    ChooseClusters,
    agreements,
    largest_stable,
    mean_and_error,
)


def test_the_number_of_separate_clouds_is_found(make_run: Any) -> None:
    run = make_run(n=480, width=6, clouds=5)
    metrics = ChooseClusters(k_range=(2, 8), resamples=6)(run)
    assert metrics["k"] == 5
    assert run.load("clusters.json") == {"k": 5}
    assert metrics["stability"] > 0.99
    assert metrics["on_edge"] == 0
    table = run.load("k_selection.csv")
    assert list(table["k"]) == list(range(2, 9))
    assert table["inertia"].is_monotonic_decreasing
    assert set(metrics) == ChooseClusters().metric_names()


def test_clouds_in_groups_are_not_merged() -> None:
    """Where a coarse partition is as stable as the true one, the finer one is chosen."""
    group, cloud = np.divmod(np.arange(9), 3)
    angle = 2 * np.pi / 3 * np.arange(3)
    corner = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points, _ = make_blobs(450, centers=50 * corner[group] + 10 * corner[cloud], random_state=0)
    stage = ChooseClusters(resamples=6)
    table = pd.DataFrame([stage.score(points, k, 0) for k in (2, 3, 4, 8, 9, 10)])
    assert table.set_index("k")["stability"][[3, 9]].min() > 0.99
    assert largest_stable(table) == 9


def test_indices_agree_with_their_definitions() -> None:
    points, _ = make_blobs(150, 3, centers=4, random_state=0)
    scores = ChooseClusters(resamples=3).score(points, 4, seed=1)
    fit = k_means(points, 4, seed=1)
    assert scores["inertia"] == pytest.approx(fit.inertia_)
    assert scores["silhouette"] == pytest.approx(silhouette_score(points, fit.labels_))
    assert scores == ChooseClusters(resamples=3).score(points, 4, seed=1)


@settings(max_examples=20, deadline=None)
@given(arrays(np.int64, (3, 20), elements=st.integers(0, 3)))
def test_agreements_are_adjusted_rand_indices(fits: Any) -> None:
    assume(all(len(np.unique(fit)) > 1 for fit in fits))
    found = agreements(fits)
    for i, j in product(range(3), repeat=2):
        assert found[i, j] == pytest.approx(adjusted_rand_score(fits[i], fits[j]), abs=1e-9)


def test_error_of_the_mean_agreement_is_a_jackknife() -> None:
    fits = np.random.default_rng(0).integers(3, size=(5, 40))

    def mean(rows: Any) -> float:
        return float(np.mean([adjusted_rand_score(a, b) for a, b in combinations(rows, 2)]))

    without = np.array([mean(np.delete(fits, i, 0)) for i in range(5)])
    error = np.sqrt(4 / 5 * np.sum((without - without.mean()) ** 2))
    assert mean_and_error(agreements(fits)) == pytest.approx((mean(fits), error))


@pytest.mark.parametrize(
    ("k_range", "message"),
    [
        ((2, 4), "k=4 is the largest tried, so a better one may lie outside; widen it: "
                 "stage.it.k_range=[2,8]"),
        ((4, 6), "k=4 is the smallest tried, so a better one may lie outside; widen it: "
                 "stage.it.k_range=[2,6]"),
    ],
)  # fmt: skip
def test_a_choice_on_the_edge_of_the_range_is_logged(
    make_run: Any, caplog: pytest.LogCaptureFixture, k_range: tuple[int, int], message: str
) -> None:
    with caplog.at_level(logging.WARNING):
        metrics = ChooseClusters(k_range=k_range, resamples=4)(make_run())
    assert metrics["on_edge"] == 1
    assert message in caplog.messages


def test_a_large_training_set_is_sampled(make_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        metrics = ChooseClusters(k_range=(3, 5), resamples=4, max_rows=80)(make_run())
    assert "k is chosen on 80 of 120 samples" in caplog.messages
    assert metrics["k"] == 4


def test_more_clusters_than_samples_is_an_error(make_run: Any) -> None:
    with pytest.raises(UserError, match=r"stage.it.k_range=\[2,18\] goes beyond the 8 samples"):
        ChooseClusters(k_range=(2, 18))(make_run(n=16))


def test_a_collapsed_latent_is_an_error(make_run: Any) -> None:
    with pytest.raises(UserError, match="it: posterior collapse: 0 of 4 latent units"):
        ChooseClusters()(make_run(scale=0.001))
