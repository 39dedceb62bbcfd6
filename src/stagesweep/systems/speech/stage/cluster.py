"""Stage that clusters clips by their encoder states, one cluster for each expert."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, KMeans, SpectralClustering
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from stagesweep.base.errors import UserError
from stagesweep.config.schema import bounded

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]
Method = Literal["hdbscan", "spectral", "random"]

# The most centres of a cluster, and the samples that each has at least on average.
CENTRES = 10


@dataclass
class Cluster:
    """Cluster the vectors of training clips (``pooled.npy``) into as many clusters as experts.

    `reduce`: pca to `dim` dimensions; umap of these (for the clustering; distances are those of the
    components); or none. `method`: hdbscan (Campello et al. 2013), spectral, or random, for
    comparison.

    HDBSCAN: `min_cluster_size` decreases to 2 until there are enough clusters; their number is not
    monotonic in it. Excess clusters are merged by Ward's criterion. If no size gives enough
    clusters, `fewer` decides: shrink (experts without a cluster are never used; spectral if there
    is no cluster at all), spectral, or fail.

    Noise and clips that were not clustered are assigned to the nearest cluster. Soft targets are
    softmax(-d² / temperature), with d² in units of its mean over the training clips.

    `model_unused`: keys of the model that do not affect this stage, as in `Extract`.

    Saves ``clusters.csv`` (the rows of ``extracted.csv`` with `cluster` and `noise`) and
    ``clusters.npz`` (`soft` (n, E), and the arrays of `Clustering`).
    """

    method: Method = "hdbscan"
    reduce: Literal["none", "pca", "umap"] = "pca"
    dim: int = bounded(50, ge=1)
    min_cluster_size: int = bounded(5, ge=2)
    fewer: Literal["shrink", "spectral", "fail"] = "shrink"
    temperature: float = bounded(0.5, gt=0)
    model_unused: Sequence[str] = ("k", "alpha", "dropout", "curriculum", "temperature", "noise")

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the number of clusters, the share of noise, the smallest and largest share of a
        cluster, and the adjusted Rand index with strata and speakers.
        """
        model: Any = run.model
        vectors = np.load(run.find("pooled.npy"), mmap_mode="r")
        table = run.load("extracted.csv")
        train = (table["split"] == "train").to_numpy()
        own = np.asarray(vectors[train], dtype=np.float64)
        experts = model.experts
        if len(own) < experts:
            raise UserError(
                f"stage.{run.stage}: {len(own)} clips are too few for {experts} clusters; extract "
                "more (stage.extract.samples) or reduce model.experts"
            )
        with threadpool_limits(limits=1):
            projection = Projection.fit(own, None if self.reduce == "none" else self.dim)
            points = projection.points(own)
            raw = self.labels(run, points, experts)
            found = Clustering.fit(projection, points, raw, experts, self.temperature)
        cluster, soft = found.assign(vectors)
        if self.method == "random":
            cluster[train], soft[train] = raw, np.eye(experts)[raw]
        noise = np.zeros(len(table), bool)
        noise[train] = raw < 0
        table = table.assign(cluster=cluster, noise=noise)
        run.save("clusters.csv", table)
        run.save("clusters.npz", {"soft": soft.astype(np.float32), **found.arrays()})
        count = len(np.unique(found.merged))
        self.shrink(run, model, count)
        return self.metrics(table[train], count)

    def labels(self, run: "Context", points: Array, experts: int) -> NDArray[np.int64]:
        """Return a cluster for each point (n,), -1 for noise; there may be more than experts."""
        seed = run.seed % 2**31
        if self.method == "random":
            even = np.arange(len(points)) % experts
            return np.random.default_rng(seed).permutation(even)
        if self.reduce == "umap":
            points = umap_embedding(points, self.dim, seed)
        if self.method == "spectral":
            return spectral(points, experts, seed)
        best = np.full(len(points), -1)
        sizes = range(min(self.min_cluster_size, len(points)), 1, -1)
        for size in sizes:
            found = HDBSCAN(min_cluster_size=size, copy=True).fit(points).labels_
            count = int(found.max()) + 1
            if count > int(best.max()) + 1:
                best = found
            if count >= experts:
                if size < self.min_cluster_size:
                    run.log.info("%s: %d clusters with min_cluster_size=%d", run.stage, count, size)
                return np.asarray(found, np.int64)
        return self.too_few(run, points, np.asarray(best, np.int64), experts, seed)

    def too_few(
        self, run: "Context", points: Array, best: NDArray[np.int64], experts: int, seed: int
    ) -> NDArray[np.int64]:
        """Handle fewer clusters of HDBSCAN than experts, as `fewer` says."""
        count = int(best.max()) + 1
        message = f"stage.{run.stage}: HDBSCAN finds {count} clusters for {experts} experts"
        if self.fewer == "fail":
            raise UserError(
                f"{message} with every min_cluster_size from {self.min_cluster_size} to 2; set "
                f"model.experts={max(count, 1)}, stage.{run.stage}.fewer=shrink or spectral, or "
                f"stage.{run.stage}.method=spectral"
            )
        if self.fewer == "shrink" and count > 0:
            run.log.warning("%s; experts without a cluster are never used", message)
            return best
        run.log.warning("%s; spectral clustering is used instead", message)
        return spectral(points, experts, seed)

    def shrink(self, run: "Context", model: Any, count: int) -> None:
        """Deactivate the experts without a cluster."""
        active = torch.arange(model.experts, device=model.gate.active.device) < count
        if not torch.equal(active, model.gate.active):
            model.gate.active.copy_(active)
            run.save_weights()

    def metrics(self, table: pd.DataFrame, count: int) -> dict[str, float]:
        """Return the metrics of the clusters of training clips."""
        shares = table["cluster"].value_counts(normalize=True)
        return {
            "clusters": float(count),
            "noise": float(table["noise"].mean()),
            "smallest": float(shares.min()) if len(shares) == count else 0.0,
            "largest": float(shares.max()),
            **{
                f"{name}_ari": float(adjusted_rand_score(table[name], table["cluster"]))
                for name in ("stratum", "speaker")
            },
        }

    def metric_names(self) -> set[str] | None:
        """Names of the metrics of this stage."""
        return {"clusters", "noise", "smallest", "largest", "stratum_ari", "speaker_ari"}


@dataclass
class Projection:
    """Space of the distances: principal components, or the vectors themselves."""

    mean: Array  # (width,)
    components: Array  # (dim, width); (0, width) without reduction

    @classmethod
    def fit(cls, vectors: Array, dim: int | None) -> "Projection":
        """Fit `dim` components to vectors (n, width); None for no reduction."""
        if dim is None:
            return cls(vectors.mean(0), np.empty((0, vectors.shape[1])))
        pca = PCA(min(dim, *vectors.shape), svd_solver="full").fit(vectors)
        return cls(pca.mean_, pca.components_)

    def points(self, vectors: Array) -> Array:
        """Project vectors (n, width) to points (n, dim)."""
        centred = np.asarray(vectors, np.float64) - self.mean
        return centred @ self.components.T if len(self.components) else centred


@dataclass
class Clustering:
    """Clusters by their `centres` (m, dim). `merged` (m,) is the expert of each centre. Squared
    distances are divided by `scale`.
    """

    projection: Projection
    centres: Array
    merged: Array
    experts: int
    scale: float

    @classmethod
    def fit(
        cls, projection: Projection, points: Array, labels: Array, experts: int, temperature: float
    ) -> "Clustering":
        """Compute centres of points (n, dim) with given labels, -1 for noise."""
        kinds = np.unique(labels[labels >= 0])
        merged = np.arange(len(kinds))
        if len(kinds) > experts:
            means = np.stack([points[labels == kind].mean(0) for kind in kinds])
            merged = AgglomerativeClustering(experts, linkage="ward").fit_predict(means)
        # Clusters are numbered by decreasing size.
        sizes = [np.isin(labels, kinds[merged == k]).sum() for k in range(merged.max() + 1)]
        merged = np.argsort(np.argsort(-np.array(sizes), kind="stable"))[merged]
        parts = [cluster_centres(points[labels == kind]) for kind in kinds]
        centres, merged = np.concatenate(parts), np.repeat(merged, list(map(len, parts)))
        nearest = float(squared_distances(points, centres).min(1).mean())
        return cls(projection, centres, merged, experts, max(nearest, 1e-12) * temperature)

    def assign(self, vectors: Array, batch: int = 4096) -> tuple[Array, Array]:
        """Return the cluster (n,) and the membership probabilities (n, E) of vectors (n, width)."""
        shares = np.zeros((len(vectors), self.experts))
        for start in range(0, len(vectors), batch):
            points = self.projection.points(vectors[start : start + batch])
            distances = squared_distances(points, self.centres)
            nearest = np.full((len(points), self.experts), np.inf)
            for kind in np.unique(self.merged):
                nearest[:, kind] = distances[:, self.merged == kind].min(1)
            scores = -(nearest - nearest.min(1, keepdims=True)) / self.scale
            own = np.exp(scores)
            shares[start : start + batch] = own / own.sum(1, keepdims=True)
        return shares.argmax(1), shares

    def arrays(self) -> dict[str, Array]:
        """Return all fields as arrays."""
        return {
            "mean": self.projection.mean,
            "components": self.projection.components,
            "centres": self.centres,
            "merged": self.merged,
            "experts": np.array(self.experts),
            "scale": np.array(self.scale),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> "Clustering":
        """Restore a clustering from its `arrays`."""
        projection = Projection(arrays["mean"], arrays["components"])
        experts, scale = int(arrays["experts"]), float(arrays["scale"])
        return cls(projection, arrays["centres"], arrays["merged"], experts, scale)


def cluster_centres(points: Array) -> Array:
    """Return several centres (m, dim) of one cluster (n, dim), because it need not be round."""
    distinct = len(np.unique(points, axis=0))
    count = min(CENTRES, -(-len(points) // CENTRES), distinct)
    found: Array = KMeans(count, n_init=1, random_state=0).fit(points).cluster_centers_
    return found


def squared_distances(points: Array, centres: Array) -> Array:
    """Return squared distances (n, m) of points (n, dim) from centres (m, dim)."""
    products = points @ centres.T
    found: Array = (points**2).sum(1)[:, None] - 2 * products + (centres**2).sum(1)
    return found.clip(min=0)


def spectral(points: Array, count: int, seed: int) -> NDArray[np.int64]:
    """Spectral clustering (Ng et al. 2001) of the graph of ten nearest neighbours."""
    near = min(10, len(points) - 1)
    with warnings.catch_warnings():
        # Well separated clusters have a graph with several components.
        warnings.simplefilter("ignore", UserWarning)
        fitted = SpectralClustering(
            count, affinity="nearest_neighbors", n_neighbors=max(near, 1), random_state=seed
        ).fit(points)
    return np.asarray(fitted.labels_, np.int64)


def umap_embedding(points: Array, dim: int, seed: int) -> Array:
    """Embed points in `dim` dimensions by UMAP (McInnes et al. 2018)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from umap import UMAP  # takes seconds to import

        wanted = max(1, min(dim, len(points) - 2))
        near = min(15, len(points) - 1)
        found: Array = UMAP(
            n_components=wanted, n_neighbors=near, min_dist=0.0, n_jobs=1, random_state=seed
        ).fit_transform(points)
    return found
