"""The stage that draws the figures of a clustering run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from stagesweep.config import schema
from stagesweep.stage.clustering.profiles import cluster_profiles
from stagesweep.stage.plotting import (
    BLUE,
    GREY,
    MAX_KINDS,
    MAX_POINTS,
    MAX_ROWS,
    ORANGE,
    heatmap,
    pca_projection,
    save_figures,
    scatter,
    style_axes,
    umap_projection,
)
from stagesweep.stage.training_curves import training

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class Figures(schema.Figures):
    """Draw the results of earlier stages; a figure without data is left out."""

    def __call__(self, run: "Context") -> dict[str, float]:
        """Save the figures and return ``figures``, their number."""
        return save_figures(run, self.draw(run), self.dpi)

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives."""
        return {"figures"}

    def draw(self, run: "Context") -> Iterator[tuple[str, Figure]]:
        """Yield the name and figure of everything that has data."""
        if stages := run.fit_stages:
            yield "training", training({stage: run.history(stage) for stage in stages})
        if run.has("k_selection.csv"):
            yield (
                "k_selection",
                k_selection(run.load("k_selection.csv"), run.load("clusters.json")["k"]),
            )
        if run.has("clusters.csv"):
            samples = run.load("clusters.csv")
            samples = samples[samples["split"] == "train"]
            means = run.load("embeddings.npz")["train/mean"]
            yield "embedding", embedding(means, samples, run.seed if self.umap else None)
            for label in few_valued(samples):
                yield f"confusion_{label}", confusion(samples[label], samples["cluster"])
        if run.has("profiles.csv"):
            profiles = run.load("profiles.csv")
            column = profiles["column"].iloc[0]
            yield "profiles", cluster_profiles(profiles, column, run.data.spec.features[column])
        if run.has("enrichment.csv"):
            table = run.load("enrichment.csv")
            if len(table):
                yield "enrichment", enrichment(table)
        if run.has("comparison.csv"):
            yield "comparison", comparison(run.load("comparison.csv"))


def k_selection(table: pd.DataFrame, chosen: int) -> Figure:
    """Stability with its standard error, and internal scores, for every k tried."""
    figure = Figure((12, 5), layout="constrained")
    axes = figure.subplot_mosaic("AABC;AADE")
    panels = {
        "A": ("stability", "stability (adjusted Rand index, ± 1 s.e.)"),
        "B": ("silhouette", "silhouette (high is good)"),
        "C": ("davies_bouldin", "Davies-Bouldin (low is good)"),
        "D": ("calinski_harabasz", "Calinski-Harabasz (high is good)"),
        "E": ("inertia", "inertia (look for the elbow)"),
    }
    for key, (column, title) in panels.items():
        ax = axes[key]
        error = table["stability_se"] if key == "A" else None
        ax.axvline(chosen, color=ORANGE, lw=6, alpha=0.3)
        ax.errorbar(table["k"], table[column], error, color=BLUE, marker="o", ms=4, capsize=3)
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("number of clusters k")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        style_axes(ax)
    best = table.loc[table["stability"].idxmax()]
    within = best["stability"] - best["stability_se"]
    axes["A"].axhline(within, color=GREY, lw=1, ls="--")
    axes["A"].annotate(
        "best $-$ 1 s.e.", (table["k"].max(), within), color=GREY, ha="right", va="bottom"
    )
    figure.suptitle(f"Choice of the number of clusters: k = {chosen}")
    return figure


def embedding(means: NDArray[np.floating], samples: pd.DataFrame, seed: int | None) -> Figure:
    """Latent means by PCA and, with a seed, by UMAP; coloured by cluster and by labels.

    Labels with many values are left out.
    """
    rows = np.random.default_rng(0).permutation(len(means))[:MAX_POINTS]
    shown = samples.iloc[rows]
    maps = [pca_projection(means[rows])]
    if seed is not None and len(rows) > 3:
        points = umap_projection(means[rows], maps[0][0], seed)
        maps.append((points, "UMAP 1", "UMAP 2"))
    colourings = ["cluster", *few_valued(samples)]
    size = (1 + 5.2 * len(maps), 0.6 + 4.4 * len(colourings))
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(len(colourings), len(maps), squeeze=False)
    for axes, colouring in zip(grid, colourings, strict=True):
        for ax, (points, *names) in zip(axes, maps, strict=True):
            scatter(ax, points, shown[colouring], numbered=colouring == "cluster")
            ax.set(xlabel=names[0], ylabel=names[1], xticks=[], yticks=[])
            ax.set_title(f"by {colouring}")
            style_axes(ax, grid=False)
        if colouring != "cluster":
            legend = axes[-1].legend(
                loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2
            )
            for handle in legend.legend_handles:
                handle.set_alpha(1)
    some = f"{len(rows):,} of " if len(rows) < len(means) else ""
    figure.suptitle(f"Latent means (n = {some}{len(means):,})")
    return figure


def confusion(labels: pd.Series, clusters: pd.Series) -> Figure:
    """Confusion matrix of labels and clusters, with matched clusters on the diagonal."""
    counts = pd.crosstab(labels, clusters)
    rows, columns = linear_sum_assignment(counts.to_numpy(), maximize=True)
    order = [*columns[np.argsort(rows)], *(c for c in range(counts.shape[1]) if c not in columns)]
    counts = counts.iloc[:, order]
    size = (2.5 + 0.5 * counts.shape[1], 1.8 + 0.36 * len(counts))
    figure = Figure(size, layout="constrained")
    ax = figure.subplots()
    shares = counts.div(counts.sum(axis=1), axis=0)
    heatmap(figure, ax, shares, f"share of the {labels.name}", vmax=1)
    for (row, column), count in np.ndenumerate(counts.to_numpy()):
        if count:
            colour = "white" if shares.iat[row, column] > 0.6 else "black"
            ax.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    ax.set(xlabel="cluster", ylabel=labels.name)
    ax.set_title(f"{labels.name} by cluster (n = {int(counts.to_numpy().sum()):,})")
    return figure


def enrichment(table: pd.DataFrame) -> Figure:
    """Enrichment q of each label in each cluster, for the labels with the smallest p."""
    # Selected by p, because many q are exactly 1.
    best = table.groupby("label")["p"].min().nsmallest(MAX_ROWS)
    shown = table[table["label"].isin(best.index)]
    p, q = (shown.pivot(index="label", columns="cluster", values=v).loc[best.index] for v in "pq")
    # Grouped by the cluster with the smallest p, then sorted by p.
    order = np.lexsort((best.to_numpy(), p.to_numpy().argmin(axis=1)))
    values = -np.log10(q.iloc[order].clip(lower=1e-300))
    size = (3.5 + 0.42 * values.shape[1], 1.8 + 0.24 * len(values))
    figure = Figure(size, layout="constrained")
    ax = figure.subplots()
    heatmap(figure, ax, values, "$-\\log_{10}$ q (dot: q < 0.05)", vmax=10)
    for row, column in np.argwhere(values.to_numpy() > -np.log10(0.05)):
        ax.plot(column, row, "o", ms=4, mfc="white", mec="black")
    ax.set_xlabel("cluster")
    kind, labels = table["kind"].iloc[0], table.groupby("label")["q"].min()
    ax.set_title(
        f"Enrichment of {kind} in clusters: {(labels < 0.05).sum()} of {len(labels)} at q < 0.05"
        + (f"\n(the {MAX_ROWS} surest)" if len(labels) > MAX_ROWS else "")
    )
    return figure


def comparison(table: pd.DataFrame) -> Figure:
    """Scores of the model and the baselines: against labels or, without labels, internal."""
    table = table[table["split"] == "train"].set_index("method").iloc[::-1]
    names = {"acc": "accuracy", "nmi": "NMI", "ari": "ARI"}
    if table[[*names]].isna().all(axis=None):
        names = {"silhouette": "silhouette (latent)", "silhouette_input": "silhouette (input)"}
    names["stability"] = "stability (ARI of refits)"
    figure = Figure((2 + 2.6 * len(names), 1.2 + 0.42 * len(table)), layout="constrained")
    grid = figure.subplots(1, len(names), sharey=True)
    for ax, (column, title) in zip(grid, names.items(), strict=True):
        values = table[column].fillna(0)
        colours = [ORANGE if method == "model" else GREY for method in table.index]
        bars = ax.barh(table.index, values, color=colours)
        ax.bar_label(bars, [f"{v:.3f}" for v in table[column]], padding=3, fontsize=9)
        low, high = min(0, values.min()), max(0, values.max())
        room = 0.25 * (high - low)
        # Most scores have the maximum 1: they share one scale.
        unit = low == 0 and high > 0.3
        ax.set_xlim(low - room * (low < 0), 1.2 if unit else high + room + 0.01)
        ax.set_title(title, fontsize="medium")
        style_axes(ax)
    figure.suptitle(f"The model and the baselines (n = {table['n'].iloc[0]:,}, those trained on)")
    return figure


def few_valued(samples: pd.DataFrame) -> list[str]:
    """Label columns with few enough values for a colour each."""
    # Columns that begin with "cluster" are clusters of the model and the baselines.
    own = ("id", "split", "confidence")
    labels = [c for c in samples if c not in own and not c.startswith("cluster")]
    return [label for label in labels if 2 <= samples[label].nunique() <= MAX_KINDS]
