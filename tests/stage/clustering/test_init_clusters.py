from typing import Any

import numpy as np
import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.metric.clustering import ari
from stagesweep.stage.clustering.init_clusters import InitClusters


def test_centres_are_the_means_of_the_clouds(make_run: Any) -> None:
    run = make_run()
    expected = run.model.clusters.centres.detach().clone()
    run.model.clusters.set_centres(torch.zeros_like(expected))
    metrics = InitClusters()(run)
    distance = torch.cdist(expected, run.model.clusters.centres)
    assert distance.min(dim=1).values.max() < 1e-4
    assert metrics["k"] == 4
    assert metrics["active_units"] == 4
    assert set(metrics) == InitClusters().metric_names()


def test_inertia_is_the_distance_to_the_centres(make_run: Any) -> None:
    run = make_run()
    metrics = InitClusters()(run)
    means = torch.from_numpy(run.predict("train", ["mean"])["mean"])
    nearest = torch.cdist(means, run.model.clusters.centres.detach()).min(dim=1).values
    assert metrics["inertia"] == pytest.approx(nearest.square().sum().item(), rel=1e-4)


def test_weights_are_saved_for_later_stages(make_run: Any) -> None:
    run = make_run()
    InitClusters(k=7)(run)
    state = torch.load(run._entry.path / "weights.pt", weights_only=True)["model"]
    assert torch.equal(state["clusters.centres"], run.model.clusters.centres)
    assert len(state["clusters.centres"]) == 7


def test_k_is_the_setting_or_the_earlier_choice_or_that_of_the_model(make_run: Any) -> None:
    run = make_run()
    assert InitClusters()(run)["k"] == 4
    run.save("clusters.json", {"k": 3})
    assert InitClusters()(run)["k"] == 3
    assert InitClusters(k=5)(run)["k"] == 5


def test_the_same_seed_gives_the_same_centres(make_run: Any) -> None:
    centres = []
    for _ in range(2):
        run = make_run(n=200, clouds=6)
        InitClusters(k=9, n_init=1)(run)
        centres.append(run.predict("train", ["assignment"])["assignment"].argmax(axis=1))
    assert np.array_equal(*centres)
    assert ari(centres[0], centres[1]) == 1


def test_more_clusters_than_samples_is_an_error(make_run: Any) -> None:
    with pytest.raises(
        UserError, match=r"it: 9 clusters, but only 8 training samples; set stage.it.k to fewer"
    ):
        InitClusters(k=9)(make_run(n=16))


def test_a_collapsed_latent_is_an_error(make_run: Any) -> None:
    with pytest.raises(UserError, match="it: posterior collapse: 0 of 4 latent units are active"):
        InitClusters()(make_run(scale=0.001))
