"""The stage that chooses the number of clusters."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.metric import clustering
from stagesweep.metric.k_means import k_means
from stagesweep.metric.latent import active_units

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Points = NDArray[np.floating]


@dataclass
class ChooseClusters(schema.ChooseClusters):
    """Choose k by the stability of k-means on bootstrap samples of the latent means.

    Silhouette rises when a latent space collapses; stability does not. For each k, k-means is
    fitted to bootstrap samples, and every fit assigns all samples. Stability is the mean adjusted
    Rand index of all pairs of fits (Ben-Hur et al. 2002; Lange et al. 2004). Its standard error is
    a jackknife over the bootstrap samples.

    Where clusters form groups, merging along the groups is perfectly stable, so a coarser partition
    can be as stable as the true one. The stage therefore takes the *largest* k within one standard
    error of the most stable. On separated blobs this finds their number, where the maximum alone
    is often too small.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Save ``k_selection.csv`` and ``clusters.json``; return the row of the chosen k."""
        points = self.sample(run, latent_means(run))
        low, high = self.k_range
        # One thread: sums depend on the number of threads, and small fits are slower with more.
        with threadpool_limits(limits=1):
            tried = run.progress(range(low, high + 1), "k")
            table = pd.DataFrame([self.score(points, k, run.seed) for k in tried])
        k = largest_stable(table)
        run.save("k_selection.csv", table)
        run.save("clusters.json", {"k": k})
        on_edge = low < high and k in (low, high)
        if on_edge:
            end, wider = ("smallest", (2, high)) if k == low else ("largest", (low, 2 * high))
            run.log.warning(
                "k=%d is the %s tried, so a better one may lie outside; widen it: "
                "stage.%s.k_range=[%d,%d]",
                *(k, end, run.stage, *wider),
            )
        chosen = table.iloc[k - low].to_dict()
        return {name: float(value) for name, value in chosen.items()} | {"on_edge": float(on_edge)}

    def sample(self, run: "Context", points: Points) -> Points:
        """At most ``max_rows`` of the points (n, d); UserError when there are fewer than k."""
        if len(points) > self.max_rows:
            run.log.info("k is chosen on %d of %d samples", self.max_rows, len(points))
            rng = np.random.default_rng(run.seed)
            points = points[rng.choice(len(points), self.max_rows, replace=False)]
        low, high = self.k_range
        if high > len(points):
            raise UserError(
                f"stage.{run.stage}.k_range=[{low},{high}] goes beyond the {len(points)} samples "
                "there are; lower it"
            )
        return points

    def score(self, points: Points, k: int, seed: int) -> dict[str, float]:
        """Stability of `k` clusters of points (n, d), and internal scores of one fit to all."""
        rng = np.random.default_rng([seed, k])
        fits = []
        for _ in range(self.resamples):
            sample = points[rng.integers(len(points), size=len(points))]
            fits.append(k_means(sample, k, int(rng.integers(2**32)), self.n_init).predict(points))
        stability, error = mean_and_error(agreements(np.stack(fits)))
        whole = k_means(points, k, seed)
        scores = {"k": k, "stability": stability, "stability_se": error, "inertia": whole.inertia_}
        return scores | clustering.internal(points, whole.labels_)

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives."""
        indices = {"silhouette", "davies_bouldin", "calinski_harabasz", "inertia"}
        return indices | {"k", "stability", "stability_se", "on_edge"}


def latent_means(run: "Context") -> Points:
    """Latent means (n, d) of the training split; UserError when the posterior has collapsed."""
    means: Points = run.predict("train", ["mean"])["mean"].astype(np.float64)
    if (active := active_units(means)) < 2:
        raise UserError(
            f"{run.stage}: posterior collapse: {active} of {means.shape[1]} latent units are "
            "active (variance above 0.01), too few to cluster; lower the weight of the KL term, "
            "raise its free bits or train longer"
        )
    return means


def agreements(fits: NDArray[np.integer]) -> Points:
    """Adjusted Rand index of every pair of r clusterings of n samples: (r, n) to (r, r).

    Hubert & Arabie 1985, eq. 5. One matrix product gives the contingency tables of all pairs;
    a call per pair would take longer than the clusterings.
    """
    r, n = fits.shape
    members = np.eye(fits.max() + 1, dtype=np.float32)[fits]
    flat = members.transpose(1, 0, 2).reshape(n, -1)
    tables = (flat.T @ flat).reshape(r, -1, r, members.shape[2]).astype(np.float64)
    together = (tables * (tables - 1) / 2).sum(axis=(1, 3))
    own = together.diagonal()
    chance = np.outer(own, own) / (n * (n - 1) / 2)
    index: Points = (together - chance) / (np.add.outer(own, own) / 2 - chance)
    return index


def mean_and_error(pairs: Points) -> tuple[float, float]:
    """Mean over all pairs (r, r), and its jackknife standard error (Efron & Stein 1981).

    Pairs share members, so the standard error of independent pairs would be too small.
    """
    r = len(pairs)
    sums = pairs.sum(axis=0) - pairs.diagonal()
    without = (sums.sum() - 2 * sums) / ((r - 1) * (r - 2))
    error = np.sqrt((r - 1) / r * ((without - without.mean()) ** 2).sum())
    return float(sums.sum() / (r * (r - 1))), float(error)


def largest_stable(table: pd.DataFrame) -> int:
    """The largest k whose stability is within one standard error of the best."""
    best = table.loc[table["stability"].idxmax()]
    return int(table["k"][table["stability"] >= best["stability"] - best["stability_se"]].max())
