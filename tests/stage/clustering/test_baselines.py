import logging
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_moons
from torch import nn

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.metric.clustering import ari, nmi
from stagesweep.stage.clustering import baselines
from stagesweep.stage.clustering.baselines import FITS, Baselines, NoiseFree, gmm, kmeans, spectral

FIT = schema.Fit(epochs=2, batch_size=64, loss={"reconstruction": schema.Weight()})


class Encoder(nn.Module):
    """A model with the noise of a variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 3), nn.Linear(3, 4)

    def sample_noise(self, n: int, generator: Any) -> Any:
        raise AssertionError("a plain autoencoder draws no noise")

    def forward(self, batch: Any) -> Any:
        mean = self.encode(batch["points"])
        scale, shift = batch["points/scale"], batch["points/shift"]
        return {"mean": mean, "points": self.decode(mean) * scale + shift}


@pytest.fixture
def run(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    run = make_run()
    monkeypatch.setattr(run, "build_model", Encoder)
    return run


def test_all_methods_find_separate_clouds_in_every_split(run: Any) -> None:
    stage = Baselines(column="points", autoencoder=FIT, stability_seeds=1)
    metrics = stage(run)
    assert set(metrics) == stage.metric_names()
    assert metrics["k"] == 4
    found = run.load("baselines.npz")
    assert set(found) == {f"{method}/{s}" for method in FITS for s in ("train", "val", "test")}
    for name, clusters in found.items():
        labels = run.view(name.split("/")[1])["blob"].numpy()
        assert clusters.shape == (2, len(labels))
        assert ari(labels, clusters[0]) > 0.95, name


def test_the_autoencoder_is_trained_anew_and_the_model_stays(run: Any) -> None:
    before = run.model.clusters.centres.clone()
    metrics = Baselines(column="points", methods=["autoencoder"], autoencoder=FIT)(run)
    assert metrics["autoencoder_loss"] > 0
    assert (run.model.clusters.centres == before).all()
    assert not hasattr(NoiseFree(Encoder()), "sample_noise")


def test_k_may_be_set(run: Any) -> None:
    Baselines(column="points", methods=["kmeans"], k=6)(run)
    assert run.load("baselines.npz")["kmeans/train"].max() == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["dbscan"]}, "stage.it.methods names 'dbscan'; choose from kmeans, gmm"),
        ({"methods": ["autoencoder"]}, "names 'autoencoder', which needs stage.it.autoencoder"),
        ({"methods": ["kmeans"], "k": 121}, "it: 121 clusters, but only 120 training samples"),
    ],
)
def test_invalid_settings_are_errors(run: Any, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Baselines(column="points", **settings)(run)


def test_spectral_clustering_of_many_rows_is_fitted_to_a_sample(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(baselines, "SPECTRAL_ROWS", 60)
    with caplog.at_level(logging.INFO):
        Baselines(column="points", methods=["spectral"])(run)
    assert "spectral clustering is fitted to 60 rows" in caplog.messages
    clusters = run.load("baselines.npz")["spectral/train"][0]
    assert ari(run.view("train")["blob"].numpy(), clusters) > 0.95


def test_spectral_clustering_follows_curves_that_k_means_cuts() -> None:
    points, labels = make_moons(300, noise=0.05, random_state=0)
    assert ari(labels, spectral(points, 2, 0)(points)) > 0.99
    assert ari(labels, kmeans(points, 2, 0)(points)) < 0.5


def test_a_mixture_of_gaussians_sees_principal_components_of_wide_data() -> None:
    """With 64 pixels, a full covariance per cluster has more parameters than samples."""
    pixels, digits = load_digits(return_X_y=True)
    clusters = gmm(pixels[:600].astype(np.float32), 10, 0)(pixels)
    assert clusters.shape == (1797,)
    assert nmi(digits, clusters) > 0.6
