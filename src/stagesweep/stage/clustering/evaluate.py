"""The stage that scores a clustering and saves its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Spec
from stagesweep.config import schema
from stagesweep.data.labels import label_names
from stagesweep.metric import clustering
from stagesweep.metric.enrichment import enrichment
from stagesweep.metric.k_means import k_means
from stagesweep.metric.latent import active_units
from stagesweep.metric.reconstruction import reconstruction_error

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]
Arrays = dict[str, Array]
Fits = dict[str, dict[str, Array]]

# Prefix of the metrics of a split. A clustering is scored on train, which it was fitted to; val
# steers a search; test is used once, at its end.
PREFIX = {"train": "", "val": "val_", "test": "test_"}
EXTERNAL = ("acc", "nmi", "ari", "purity")
INTERNAL = ("silhouette", "silhouette_input", "davies_bouldin", "clusters_used")


@dataclass
class Evaluate(schema.Evaluate):
    """Score the clusters of the model and of the baselines in one table.

    Saves ``comparison.csv`` (a row for each method and split), ``clusters.csv`` (a row for each
    sample: its cluster, and ``cluster_<method>`` of each baseline), ``embeddings.npz``
    (``<split>/mean`` ...), ``profiles.csv`` (the mean input of each cluster),
    ``reconstruction.csv`` (errors of each feature) and ``enrichment.csv``, with features in native
    units. Raises UserError for a collapsed model, after all files are written.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the model's scores on train, and as ``val_...`` and ``test_...`` on the others."""
        self.check_spec(run.stage, run.data.spec)
        parts = {split: self.read(run, split) for split in PREFIX}
        fits = self.fits(run, parts)
        self.save_samples(run, parts, fits)
        errors = reconstruction(run, parts)
        run.save("reconstruction.csv", errors)
        with threadpool_limits(limits=1):
            table = self.compare(run, parts, fits)
        run.save("comparison.csv", table)
        metrics = self.summarise(table)
        for split, prefix in PREFIX.items():
            metrics[f"{prefix}reconstruction_mae"] = overall_mae(errors, split, self.column)
        means = parts["train"]["mean"]
        metrics |= {"active_units": active_units(means), "latent_dimensions": dimensions(means)}
        self.refuse_collapse(run, metrics)
        return metrics

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives."""
        scores = {*INTERNAL, "reconstruction_mae"}
        scores |= set(EXTERNAL) if self.label else set()
        scores |= {"leakage_ari"} if self.leakage else set()
        best = {f"baseline_{name}" for name in EXTERNAL} if self.label else set()
        split = {f"{prefix}{name}" for prefix in PREFIX.values() for name in scores}
        return split | best | {"stability", "active_units", "latent_dimensions"}

    @property
    def labels(self) -> list[str]:
        """Label columns in use, the scored one first."""
        return list(dict.fromkeys(n for n in (self.label, self.enrichment, self.leakage) if n))

    def check_spec(self, name: str, spec: Spec) -> None:
        """Raise UserError when the data lacks a column or label of the stage ``name``."""
        asked: list[tuple[str, str | None, Mapping[str, Any]]]
        asked = [("column", self.column, spec.features)]
        asked += [(n, getattr(self, n), spec.labels) for n in ("label", "enrichment", "leakage")]
        for key, value, columns in asked:
            if value is not None and value not in columns:
                raise UserError(
                    f"stage.{name}.{key}={value}, but the data has no such column; "
                    f"choose from: {', '.join(columns) or 'none'}"
                )

    def read(self, run: "Context", split: str) -> Arrays:
        """Model outputs and columns of a split, and the `cluster` (n,) of each sample."""
        view = run.view(split)
        names = {"mean", "logvar", "assignment", "index", *self.labels}
        for feature in run.data.spec.features:
            extra = (f"{feature}/{part}" for part in ("mask", "shift", "scale"))
            names |= {feature, f"input/{feature}", *(name for name in extra if name in view)}
        part: Arrays = dict(run.predict(split, sorted(names)))
        part["cluster"] = part["assignment"].argmax(axis=1)
        return part

    def fits(self, run: "Context", parts: Mapping[str, Arrays]) -> Fits:
        """Clusters (fits, n) of every method and split, the model first."""
        found: Fits = {"model": {split: part["cluster"][None] for split, part in parts.items()}}
        if run.has("baselines.npz"):
            for key, clusters in run.load("baselines.npz").items():
                method, split = key.split("/")
                found.setdefault(method, {})[split] = clusters
        return found

    def save_samples(self, run: "Context", parts: Mapping[str, Arrays], fits: Fits) -> None:
        """Save embeddings, clusters of all samples, cluster profiles and enrichment."""
        kept = ("mean", "logvar", "assignment", "index")
        embeddings = {f"{s}/{name}": part[name] for s, part in parts.items() for name in kept}
        run.save("embeddings.npz", embeddings)
        samples = []
        for split, part in parts.items():
            others = {f"cluster_{m}": found[split][0] for m, found in fits.items() if m != "model"}
            samples.append(members(run.data, split, part, self.labels).assign(**others))
        run.save("clusters.csv", pd.concat(samples, ignore_index=True))
        train, names = parts["train"], run.data.spec.features[self.column].names
        table = profiles(train["cluster"], native(train, self.column), names)
        run.save("profiles.csv", table.assign(column=self.column))
        if self.enrichment is not None:
            codes = train[self.enrichment]
            found = enrichment(train["cluster"], codes, label_names(run.data, self.enrichment))
            run.save("enrichment.csv", found.assign(kind=self.enrichment))

    def compare(self, run: "Context", parts: Mapping[str, Arrays], fits: Fits) -> pd.DataFrame:
        """One row for each method and split, the model first."""
        self.warn_unscored(run, parts)
        rows = []
        for method, splits in fits.items():
            again = list(splits["train"]) if method != "model" else self.refits(run, parts["train"])
            for split, clusters in splits.items():
                scores = self.score(parts[split], clusters[0])
                # Stability is defined on the training split, which the methods are fitted to.
                scores["stability"] = agreement(again) if split == "train" else nan
                rows.append({"method": method, "split": split, "n": clusters.shape[1], **scores})
        return pd.DataFrame(rows)

    def refits(self, run: "Context", part: Arrays) -> list[Array]:
        """The model's clusters of a split, and k-means refits of its latent with other seeds."""
        k = part["assignment"].shape[1]
        seeds = range(run.seed % 2**31, run.seed % 2**31 + self.stability_seeds)
        return [part["cluster"], *(k_means(part["mean"], k, seed).labels_ for seed in seeds)]

    def score(self, part: Arrays, clusters: Array) -> dict[str, float]:
        """Scores of the clusters (n,) of a split; NaN where a label cannot score them.

        Internal scores use the model's latent space for every method, `silhouette_input` the input.
        """
        scores = dict.fromkeys((*EXTERNAL, "leakage_ari"), nan)
        if self.label is not None and scorable(part[self.label]):
            scores |= clustering.external(part[self.label], clusters)
        if self.leakage is not None and scorable(part[self.leakage]):
            scores["leakage_ari"] = clustering.ari(part[self.leakage], clusters)
        return scores | {
            "silhouette": clustering.silhouette(part["mean"], clusters),
            "silhouette_input": clustering.silhouette(part[f"input/{self.column}"], clusters),
            "davies_bouldin": clustering.davies_bouldin(part["mean"], clusters),
            "clusters_used": float(len(np.unique(clusters))),
        }

    def summarise(self, table: pd.DataFrame) -> dict[str, float]:
        """The model's row of each split as metrics, and the best baseline's score of each kind."""
        names = [*INTERNAL, *(EXTERNAL if self.label else ())]
        names += ["leakage_ari"] if self.leakage else []
        model = table[table["method"] == "model"].set_index("split")
        train = table[table["split"] == "train"].set_index("method")
        metrics = {f"{p}{n}": float(model.at[s, n]) for s, p in PREFIX.items() for n in names}
        metrics["stability"] = float(model.at["train", "stability"])
        if self.label:
            best = train.drop(index="model").max()
            metrics |= {f"baseline_{name}": float(best[name]) for name in EXTERNAL}
        return metrics

    def warn_unscored(self, run: "Context", parts: Mapping[str, Arrays]) -> None:
        """Log which labels cannot score which splits."""
        for split, part in parts.items():
            for label in filter(None, (self.label, self.leakage)):
                if not scorable(part[label]):
                    run.log.warning(
                        "%s: label '%s' has %d known values of %d kinds in %s, too few to score "
                        "clusters against; its scores there are NaN",
                        *(run.stage, label, (part[label] >= 0).sum(), kinds(part[label]), split),
                    )

    def refuse_collapse(self, run: "Context", metrics: Mapping[str, float]) -> None:
        """Raise UserError when the posterior or the clustering has collapsed."""
        if metrics["latent_dimensions"] < 1.5:
            run.log.warning(
                "%s: the latent means lie close to a line (%.2f effective dimensions): units vary "
                "together, and so clusters are little more than slices of one number",
                *(run.stage, metrics["latent_dimensions"]),
            )
        active, used = int(metrics["active_units"]), int(metrics["clusters_used"])
        if active < self.min_active_units:
            raise UserError(
                f"{run.stage}: posterior collapse: {active} latent units are active (variance "
                f"above 0.01), fewer than stage.{run.stage}.min_active_units="
                f"{self.min_active_units}; lower the weight of the KL term or raise its free bits"
            )
        if used < 2:
            raise UserError(
                f"{run.stage}: all samples are in one cluster; lower the weight of the clustering "
                "term, or train longer before it starts"
            )


def kinds(codes: Array) -> int:
    """Number of distinct labels; codes below 0 mean none."""
    return len(np.unique(codes[codes >= 0]))


def scorable(codes: Array) -> bool:
    """Whether label codes (n,) can score clusters: at least two distinct labels."""
    return kinds(codes) > 1


def dimensions(means: Array) -> float:
    """Effective dimensions of latent means (n, d): the participation ratio of their variances.

    Near 1 when all units vary together, however many are active; NaN when none varies.
    """
    variances = np.linalg.eigvalsh(np.cov(means.T))
    return float(variances.sum() ** 2 / (variances**2).sum()) if variances.any() else nan


def agreement(fits: Sequence[Array]) -> float:
    """Mean adjusted Rand index of the first clustering with each of the others."""
    others = [clustering.ari(fits[0], other) for other in fits[1:]]
    return float(np.mean(others)) if others else nan


def members(data: Any, split: str, part: Arrays, labels: Sequence[str]) -> pd.DataFrame:
    """Cluster, confidence and label names of each sample of a split."""
    ids = data.ids(split) if hasattr(data, "ids") else part["index"]
    table = {"id": ids, "split": split, "cluster": part["cluster"]}
    table["confidence"] = part["assignment"].max(axis=1)
    for label in labels:
        # Index -1, the code of an unknown label, finds the last name: None.
        table[label] = np.array([*label_names(data, label), None], dtype=object)[part[label]]
    return pd.DataFrame(table)


def native(part: Arrays, column: str) -> Array:
    """Measured values (n, w) of a feature in native units, NaN where not observed."""
    values = part[f"input/{column}"].astype(np.float64)
    values = values * part.get(f"{column}/scale", 1.0) + part.get(f"{column}/shift", 0.0)
    observed: Array = part.get(f"{column}/mask", np.ones_like(values, dtype=bool))
    return np.where(observed, values, nan)


def profiles(clusters: Array, values: Array, names: Sequence[str]) -> pd.DataFrame:
    """Mean, standard deviation and count of every feature of values (n, w) in each cluster."""
    table = pd.DataFrame(values, columns=list(names)).assign(cluster=clusters)
    long = table.melt("cluster", var_name="feature")
    groups = long.groupby(["cluster", "feature"], sort=False)["value"]
    return groups.agg(["count", "mean", "std"]).reset_index().sort_values("cluster", kind="stable")


def reconstruction(run: "Context", parts: Mapping[str, Arrays]) -> pd.DataFrame:
    """Reconstruction errors of every feature, by split."""
    tables = []
    for split, part in parts.items():
        for column, features in run.data.spec.features.items():
            table = reconstruction_error(
                part[column], native(part, column), part.get(f"{column}/mask"), features.names
            )
            table.insert(0, "column", column)
            table.insert(0, "split", split)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def overall_mae(errors: pd.DataFrame, split: str, column: str) -> float:
    """Mean absolute error of a column over its observed values in a split."""
    rows = errors[(errors["split"] == split) & (errors["column"] == column) & (errors["n"] > 0)]
    return float(np.average(rows["mae"], weights=rows["n"])) if len(rows) else nan
