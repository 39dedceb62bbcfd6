"""The stage that groups clips by what the encoder makes of them: one cluster for each expert."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, SpectralClustering
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from stagesweep.base.errors import UserError

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]
Method = Literal["hdbscan", "spectral", "random"]


@dataclass
class Cluster:
    """Cluster the vectors of training clips (``pooled.npy``) into as many clusters as experts.

    `reduce` to `dim` dimensions by pca, by umap of these (UMAP finds the clusters, distances are
    those of the components), or none. `method`: hdbscan (Campello et al. 2013) with
    `min_cluster_size`, which is lowered one by one down to 2 until there are enough clusters: their
    number may rise and fall with it. More clusters than experts are merged by Ward's criterion.
    Where no size gives enough, `fewer` says what is done: shrink (the experts without a cluster are
    never used; none at all falls back on spectral), spectral, or fail. Or spectral from the start,
    or random, which has nothing to do with the clips and is for comparison.

    A clip that is noise, or that was not clustered, belongs to the nearest cluster; soft targets
    are softmax(-d² / temperature), d² in units of its mean over the training clips.

    `model_unused` are keys of the model that change nothing here, as of `Extract`.

    Leaves ``clusters.csv`` (a row for each of ``extracted.csv`` with its `cluster` and whether it
    is `noise`) and ``clusters.npz`` (`soft` (n, E), and what `assign` needs for other clips).
    """

    method: Method = "hdbscan"
    reduce: Literal["none", "pca", "umap"] = "pca"
    dim: int = 50
    min_cluster_size: int = 5
    fewer: Literal["shrink", "spectral", "fail"] = "shrink"
    temperature: float = 0.5
    model_unused: Sequence[str] = ("k", "alpha", "dropout", "curriculum", "temperature", "noise")

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return how many clusters there are, the share of noise, the smallest and largest share,
        and the adjusted Rand index with strata and speakers.
        """
        self.check(run)
        model: Any = run.model
        vectors = np.load(run.find("pooled.npy"), mmap_mode="r")
        table = run.load("extracted.csv")
        train = (table["split"] == "train").to_numpy()
        own = np.asarray(vectors[train], dtype=np.float64)
        experts = model.experts
        if len(own) < experts:
            raise UserError(
                f"stage.{run.stage}: {len(own)} clips make no {experts} clusters; extract more "
                "(stage.extract.samples) or set model.experts to fewer"
            )
        with threadpool_limits(limits=1):
            space = Projection.fit(own, None if self.reduce == "none" else self.dim)
            points = space.points(own)
            raw = self.labels(run, points, experts)
            found = Clustering.of(space, points, raw, experts, self.temperature)
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
        return self.numbers(table[train], count)

    def check(self, run: "Context") -> None:
        """Raise UserError for a setting that is not one."""
        choices = {
            "method": ("hdbscan", "spectral", "random"),
            "reduce": ("none", "pca", "umap"),
            "fewer": ("shrink", "spectral", "fail"),
        }
        for key, known in choices.items():
            if (value := getattr(self, key)) not in known:
                raise UserError(f"stage.{run.stage}.{key}={value} is one of {', '.join(known)}")
        if self.dim < 1 or self.min_cluster_size < 2 or self.temperature <= 0:
            raise UserError(
                f"stage.{run.stage}: dim must be at least 1, min_cluster_size at least 2 and "
                "temperature above 0"
            )

    def labels(self, run: "Context", points: Array, experts: int) -> NDArray[np.int64]:
        """A cluster for each point (n,), -1 for noise; there may be more of them than experts."""
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
        """What is done when HDBSCAN finds fewer clusters than there are experts."""
        count = int(best.max()) + 1
        said = f"stage.{run.stage}: HDBSCAN finds {count} clusters for {experts} experts"
        if self.fewer == "fail":
            raise UserError(
                f"{said} with every min_cluster_size from {self.min_cluster_size} to 2; set "
                f"model.experts={max(count, 1)}, stage.{run.stage}.fewer=shrink or spectral, or "
                f"stage.{run.stage}.method=spectral"
            )
        if self.fewer == "shrink" and count > 0:
            run.log.warning("%s; the others are never used", said)
            return best
        run.log.warning("%s; spectral clustering is used instead", said)
        return spectral(points, experts, seed)

    def shrink(self, run: "Context", model: Any, count: int) -> None:
        """Let the gate never choose experts that no cluster belongs to."""
        active = torch.arange(model.experts, device=model.gate.active.device) < count
        if not torch.equal(active, model.gate.active):
            model.gate.active.copy_(active)
            run.save_weights()

    def numbers(self, table: pd.DataFrame, count: int) -> dict[str, float]:
        """What is said of the clusters of training clips."""
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
        """Metrics this stage gives."""
        return {"clusters", "noise", "smallest", "largest", "stratum_ari", "speaker_ari"}


@dataclass
class Projection:
    """Where distances are measured: principal components of vectors, or vectors as they are."""

    mean: Array  # (width,)
    components: Array  # (dim, width); (0, width) for vectors as they are

    @classmethod
    def fit(cls, vectors: Array, dim: int | None) -> "Projection":
        """Components of vectors (n, width)."""
        if dim is None:
            return cls(vectors.mean(0), np.empty((0, vectors.shape[1])))
        pca = PCA(min(dim, *vectors.shape), svd_solver="full").fit(vectors)
        return cls(pca.mean_, pca.components_)

    def points(self, vectors: Array) -> Array:
        """Vectors (n, width) in this space, (n, dim)."""
        centred = np.asarray(vectors, np.float64) - self.mean
        return centred @ self.components.T if len(self.components) else centred


@dataclass
class Clustering:
    """Clusters by their centres: `centres` (m, dim), of which each belongs to one of the experts
    (`merged` (m,)); `scale` is what squared distances are divided by.
    """

    space: Projection
    centres: Array
    merged: Array
    experts: int
    scale: float

    @classmethod
    def of(
        cls, space: Projection, points: Array, labels: Array, experts: int, temperature: float
    ) -> "Clustering":
        """From points (n, dim) and the cluster of each, -1 for noise."""
        kinds = np.unique(labels[labels >= 0])
        centres = np.stack([points[labels == kind].mean(0) for kind in kinds])
        merged = np.arange(len(kinds))
        if len(kinds) > experts:
            merged = AgglomerativeClustering(experts, linkage="ward").fit_predict(centres)
        # The largest is number 0, whatever order they were found in.
        sizes = [np.isin(labels, kinds[merged == k]).sum() for k in range(merged.max() + 1)]
        merged = np.argsort(np.argsort(-np.array(sizes), kind="stable"))[merged]
        nearest = float(squared(points, centres).min(1).mean())
        return cls(space, centres, merged, experts, max(nearest, 1e-12) * temperature)

    def assign(self, vectors: Array, batch: int = 4096) -> tuple[Array, Array]:
        """The cluster (n,) of vectors (n, width), and the shares (n, E) of all clusters."""
        shares = np.zeros((len(vectors), self.experts))
        for start in range(0, len(vectors), batch):
            points = self.space.points(vectors[start : start + batch])
            away = squared(points, self.centres)
            least = np.full((len(points), self.experts), np.inf)
            for kind in np.unique(self.merged):
                least[:, kind] = away[:, self.merged == kind].min(1)
            scores = -(least - least.min(1, keepdims=True)) / self.scale
            own = np.exp(scores)
            shares[start : start + batch] = own / own.sum(1, keepdims=True)
        return shares.argmax(1), shares

    def arrays(self) -> dict[str, Array]:
        """Everything, as arrays."""
        return {
            "mean": self.space.mean,
            "components": self.space.components,
            "centres": self.centres,
            "merged": self.merged,
            "experts": np.array(self.experts),
            "scale": np.array(self.scale),
        }

    @classmethod
    def restored(cls, arrays: dict[str, Array]) -> "Clustering":
        """From its `arrays`."""
        space = Projection(arrays["mean"], arrays["components"])
        experts, scale = int(arrays["experts"]), float(arrays["scale"])
        return cls(space, arrays["centres"], arrays["merged"], experts, scale)


def squared(points: Array, centres: Array) -> Array:
    """Squared distances (n, m) of points (n, dim) from centres (m, dim)."""
    products = points @ centres.T
    found: Array = (points**2).sum(1)[:, None] - 2 * products + (centres**2).sum(1)
    return found.clip(min=0)


def spectral(points: Array, count: int, seed: int) -> NDArray[np.int64]:
    """Spectral clustering (Ng et al. 2001) of the graph of ten nearest neighbours."""
    near = min(10, len(points) - 1)
    with warnings.catch_warnings():
        # A graph of several components is what well separated clusters have.
        warnings.simplefilter("ignore", UserWarning)
        fitted = SpectralClustering(
            count, affinity="nearest_neighbors", n_neighbors=max(near, 1), random_state=seed
        ).fit(points)
    return np.asarray(fitted.labels_, np.int64)


def umap_embedding(points: Array, dim: int, seed: int) -> Array:
    """Points in `dim` dimensions by UMAP (McInnes et al. 2018), where near ones lie close."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from umap import UMAP  # takes seconds to import

        wanted = max(1, min(dim, len(points) - 2))
        near = min(15, len(points) - 1)
        found: Array = UMAP(
            n_components=wanted, n_neighbors=near, min_dist=0.0, n_jobs=1, random_state=seed
        ).fit_transform(points)
    return found
