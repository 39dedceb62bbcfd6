"""The stage that clusters with standard methods, for comparison with the model."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import SpectralClustering
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch
from stagesweep.config import schema
from stagesweep.core.predict import predict
from stagesweep.metric.k_means import k_means
from stagesweep.stage.clustering.choose_clusters import Points
from stagesweep.stage.clustering.init_clusters import number_of_clusters

if TYPE_CHECKING:
    from stagesweep.run.context import Context

# Principal components for the Gaussian mixture: with more, full covariances fit noise.
COMPONENTS = 20
NEIGHBOURS = 10
# Largest neighbour graph: the eigenvectors of a larger one take minutes.
SPECTRAL_ROWS = 5000

Clusters = NDArray[np.integer]
# Points (n, d) -> the cluster of each, (n,)
Assign = Callable[[Points], Clusters]


@dataclass
class Baselines(schema.Baselines):
    """Cluster one input column by k-means, Gaussian mixture and spectral clustering.

    Also by k-means on the latent of a plain autoencoder. All have as many clusters as the model.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Save ``baselines.npz``: ``<method>/<split>`` (fits, n), each fitted on train alone."""
        if unknown := [method for method in self.methods if method not in FITS]:
            raise UserError(
                f"stage.{run.stage}.methods names '{unknown[0]}'; choose from {', '.join(FITS)}"
            )
        column = f"input/{self.column}"
        inputs = {s: run.predict(s, [column])[column] for s in ("train", "val", "test")}
        model: Any = run.model
        k = number_of_clusters(run, self.k or len(model.clusters.centres), len(inputs["train"]))
        found: dict[str, Clusters] = {}
        metrics: dict[str, float] = {"k": k}
        for method in run.progress(self.methods, "methods"):
            points: Mapping[str, Points] = inputs
            if method == "autoencoder":
                points, metrics["autoencoder_loss"] = self.encode(run)
            for split, clusters in self.cluster(run, method, points, k).items():
                found[f"{method}/{split}"] = clusters
        run.save("baselines.npz", found)
        return metrics

    def cluster(
        self, run: "Context", method: str, points: Mapping[str, Points], k: int
    ) -> dict[str, Clusters]:
        """Clusters (fits, n) of every split; the first fit is scored."""
        if method == "spectral" and len(points["train"]) > SPECTRAL_ROWS:
            run.log.info("spectral clustering is fitted to %d rows", SPECTRAL_ROWS)
        with threadpool_limits(limits=1):
            seeds = range(run.seed % 2**31, run.seed % 2**31 + 1 + self.stability_seeds)
            fits = [FITS[method](points["train"], k, seed) for seed in seeds]
            return {split: np.stack([fit(x) for fit in fits]) for split, x in points.items()}

    def encode(self, run: "Context") -> tuple[dict[str, Points], float]:
        """Latent (n, d) of every split of a plain autoencoder, and its last training loss."""
        if self.autoencoder is None:
            raise UserError(
                f"stage.{run.stage}.methods names 'autoencoder', which needs "
                f"stage.{run.stage}.autoencoder: the settings of its fit; set them or leave it out"
            )
        model = NoiseFree(run.build_model()).to(run.device)
        metrics = run.fit(model, self.autoencoder, "autoencoder")
        views = {split: run.view(split) for split in ("train", "val", "test")}
        latent = {s: predict(model, view, ["mean"], run.profile) for s, view in views.items()}
        return {s: v["mean"].numpy() for s, v in latent.items()}, metrics["train_loss"]

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives."""
        return {"k"} | ({"autoencoder_loss"} if "autoencoder" in self.methods else set())


class NoiseFree(nn.Module):
    """A variational autoencoder without noise: it hides ``sample_noise`` from the core."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the outputs of the model at the posterior mean."""
        outputs: dict[str, Tensor] = self.model(batch)
        return outputs


def kmeans(points: Points, k: int, seed: int) -> Assign:
    """Fit k-means; the best of 10 starts."""
    fit = k_means(points, k, seed)
    return lambda x: fit.predict(x.astype(np.float64))


def gmm(points: Points, k: int, seed: int) -> Assign:
    """Fit a Gaussian mixture with full covariances; the best of 10 starts.

    Data with more than 20 columns is reduced to 20 principal components.
    """
    wide = min(points.shape) > COMPONENTS
    pca = PCA(COMPONENTS, random_state=seed).fit(points) if wide else None

    def project(x: Points) -> Points:
        reduced: Points = (x if pca is None else pca.transform(x)).astype(np.float64)
        return reduced

    mixture = GaussianMixture(k, n_init=10, max_iter=300, random_state=seed)
    fit = mixture.fit(project(points))
    return lambda x: fit.predict(project(x))


def spectral(points: Points, k: int, seed: int) -> Assign:
    """Fit spectral clustering on the graph of 10 nearest neighbours (Shi & Malik 2000).

    It clusters only the rows it was fitted to. Another row gets the cluster of the nearest of them.
    """
    rows = np.random.default_rng(seed).permutation(len(points))[:SPECTRAL_ROWS]
    fit = SpectralClustering(
        k,
        affinity="nearest_neighbors",
        n_neighbors=min(NEIGHBOURS, len(rows)),
        random_state=seed,
    )
    with warnings.catch_warnings():
        # Disconnected components of the graph are clusters.
        warnings.filterwarnings("ignore", "Graph is not fully connected")
        clusters = fit.fit_predict(points[rows])
    return KNeighborsClassifier(1).fit(points[rows], clusters).predict  # type: ignore[no-any-return]


FITS = {"kmeans": kmeans, "gmm": gmm, "spectral": spectral, "autoencoder": kmeans}
