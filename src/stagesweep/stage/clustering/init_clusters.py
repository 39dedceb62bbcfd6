"""The stage that initialises the cluster centres."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from threadpoolctl import threadpool_limits

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.metric.k_means import k_means
from stagesweep.metric.latent import active_units
from stagesweep.stage.clustering.choose_clusters import latent_means

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class InitClusters(schema.InitClusters):
    """Initialise the cluster centres by k-means on the latent means (Xie et al. 2016, 3.2)."""

    def __call__(self, run: "Context") -> dict[str, float]:
        """Save weights with the new centres; return k, inertia and active_units."""
        means = latent_means(run)
        k = number_of_clusters(run, self.k, len(means))
        with threadpool_limits(limits=1):
            fit = k_means(means, k, run.seed, self.n_init, self.max_iter)
        model: Any = run.model
        model.clusters.set_centres(torch.from_numpy(fit.cluster_centers_))
        run.save_weights()
        return {"k": k, "inertia": fit.inertia_, "active_units": active_units(means)}

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives."""
        return {"k", "inertia", "active_units"}


def number_of_clusters(run: "Context", k: int | None, samples: int) -> int:
    """`k` if it is set, else the choice of an earlier stage, else the model's current number.

    UserError when there are fewer samples than clusters.
    """
    if k is None and run.has("clusters.json"):
        k = int(run.load("clusters.json")["k"])
    if k is None:
        model: Any = run.model
        k = len(model.clusters.centres)
    if k > samples:
        raise UserError(
            f"{run.stage}: {k} clusters, but only {samples} training samples; "
            f"set stage.{run.stage}.k to fewer"
        )
    return k
