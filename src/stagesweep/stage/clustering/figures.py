"""The stage that draws the figures of a clustering run."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from stagesweep.base.spec import Features
from stagesweep.config import schema
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

if TYPE_CHECKING:
    from stagesweep.run.context import Run


@dataclass
class Figures(schema.Figures):
    """Draw what earlier stages left; a figure whose numbers are not there is left out."""

    def __call__(self, run: "Run") -> dict[str, float]:
        """Return how many figures there are."""
        return save_figures(run, self.draw(run), self.dpi)

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives."""
        return {"figures"}

    def draw(self, run: "Run") -> Iterator[tuple[str, Figure]]:
        """Draw every figure there are numbers for, and name it."""
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


# ------------------------------------------------------------------------------ training


def training(histories: dict[str, pd.DataFrame]) -> Figure:
    """Loss, its terms and the learning rate over the epochs of each fit (a column each)."""
    terms = [c for h in histories.values() for c in h if c.startswith(("train_", "val_"))]
    terms = list(dict.fromkeys(c.partition("_")[2] for c in terms))
    terms.sort(key=lambda term: term != "loss")
    rows = [*terms, "lr"]
    figure = Figure((1 + 4.2 * len(histories), 1 + 1.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(histories), squeeze=False, sharex="col")
    for axes, (stage, history) in zip(grid.T, histories.items(), strict=True):
        for ax, row in zip(axes, rows, strict=True):
            curves(ax, history, row)
        axes[0].set_title(f"{stage} ({int(history['epoch'].max())} epochs)")
        axes[-1].set_xlabel("epoch")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    named = {"lr": "learning rate", "loss": "total loss"}
    for axes, row in zip(grid, rows, strict=True):
        first = next((ax for ax in axes if ax.axison), axes[0])
        first.set_ylabel(named.get(row, row.replace("_", " ")))
    return figure


def curves(ax: Axes, history: pd.DataFrame, row: str) -> None:
    """One quantity over the epochs, on train and val."""
    names = (
        {"lr": "learning rate"} if row == "lr" else {f"train_{row}": "train", f"val_{row}": "val"}
    )
    drawn = {c: label for c, label in names.items() if c in history and history[c].notna().any()}
    if not drawn:
        ax.set_axis_off()
        return
    colours = {"val": ORANGE, "learning rate": "black"}
    for column, label in drawn.items():
        known = history[["epoch", column]].dropna()
        ax.plot(known["epoch"], known[column], color=colours.get(label, BLUE), lw=1.3, label=label)
    values = history[list(drawn)].to_numpy(float)
    low, high = np.nanmin(values), np.nanmax(values)
    if row != "lr" and 0 < low < high / 10:
        ax.set_yscale("log")
    if row == "loss":
        ax.legend(frameon=False)
    style_axes(ax)


# ------------------------------------------------------------------------------ choice of k


def k_selection(table: pd.DataFrame, chosen: int) -> Figure:
    """Stability with its standard error, and the usual indices beside it, for every k tried."""
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


# ------------------------------------------------------------------------------ maps


def embedding(means: NDArray[np.floating], samples: pd.DataFrame, seed: int | None) -> Figure:
    """The latent means in two dimensions, by PCA and by UMAP (not without a seed), coloured by
    cluster and by every label of few values.
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
    """How many samples of each label are in each cluster, clusters in the order of their labels."""
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


# ------------------------------------------------------------------------------ clusters


def cluster_profiles(table: pd.DataFrame, column: str, features: Features) -> Figure:
    """The mean input of each cluster: an image, or a profile with its standard deviation."""
    label = f"{column} ({features.unit})" if features.unit else column
    clusters = table.groupby("cluster")
    columns = min(6, ceil(len(clusters) ** 0.5) + 1)
    rows = ceil(len(clusters) / columns)
    image = features.grid is not None
    size = (1.7 * columns, 0.5 + 1.9 * rows) if image else (1 + 2.6 * columns, 0.8 + 2.2 * rows)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    everyone = weighted_mean(table)
    low = table["mean"].min() if features.low is None else features.low
    high = table["mean"].max() if features.high is None else features.high
    for ax, (cluster, profile) in zip(grid.flat, clusters, strict=False):
        if features.grid is not None:
            pixels = profile["mean"].to_numpy().reshape(features.grid)
            drawn = ax.imshow(pixels, cmap="gray_r", vmin=low, vmax=high)
            ax.set(xticks=[], yticks=[])
        else:
            line(ax, profile, everyone, features)
        ax.set_title(f"{cluster} (n = {profile['count'].max():,})", fontsize="medium")
    for ax in grid.flat[len(clusters) :]:
        ax.set_axis_off()
    if image:
        figure.colorbar(drawn, ax=grid, label=label)
        figure.suptitle("Mean image of each cluster")
    else:
        label_profiles(grid, len(clusters), label, features)
        figure.suptitle("Mean ± s.d. of each cluster, and the mean of all samples (grey)")
    return figure


def weighted_mean(table: pd.DataFrame) -> pd.Series:
    """The mean over all samples of each feature, from those of the clusters."""
    known = table[table["count"] > 0]
    total = (known["mean"] * known["count"]).groupby(known["feature"], sort=False).sum()
    mean: pd.Series = total / known.groupby("feature", sort=False)["count"].sum()
    return mean


def line(ax: Axes, profile: pd.DataFrame, everyone: pd.Series, features: Features) -> None:
    """A cluster's mean and spread over the features, with the mean of all samples behind."""
    x = np.arange(len(features.names))
    profile = profile.set_index("feature").reindex(features.names)
    # A click is no frequency: it stands apart from the line.
    tones = np.array([name.lower().endswith("hz") for name in features.names])
    for part in (tones, ~tones) if tones.any() else (~tones,):
        mean, spread = profile["mean"][part], profile["std"][part]
        style: dict[str, Any] = {"marker": "o", "ms": 3.5, "lw": 1.5}
        ax.plot(x[part], everyone.reindex(features.names)[part], color=GREY, **style, alpha=0.6)
        if part.sum() > 1:
            ax.plot(x[part], mean, color=BLUE, **style)
            ax.fill_between(x[part], mean - spread, mean + spread, color=BLUE, alpha=0.2, lw=0)
        else:
            ax.errorbar(x[part], mean, spread, color=BLUE, **style, capsize=3)
    style_axes(ax)


def label_profiles(grid: NDArray[Any], used: int, label: str, features: Features) -> None:
    """Ticks and labels of the axes around a grid of profiles."""
    first = grid.flat[0]
    first.set_xticks(range(len(features.names)), features.names)
    first.set_ylim(features.low, features.high)
    if features.unit.startswith("dB"):
        # As audiograms are drawn: what is heard softly is on top.
        first.invert_yaxis()
    for number, ax in enumerate(grid.flat[:used]):
        ax.tick_params("x", rotation=60, labelbottom=number + grid.shape[1] >= used)
    for ax in grid[:, 0]:
        ax.set_ylabel(label)


def enrichment(table: pd.DataFrame) -> Figure:
    """How sure it is that a label is overrepresented in a cluster, for the surest labels."""
    # By p: many a q is exactly 1.
    best = table.groupby("label")["p"].min().nsmallest(MAX_ROWS)
    shown = table[table["label"].isin(best.index)]
    p, q = (shown.pivot(index="label", columns="cluster", values=v).loc[best.index] for v in "pq")
    # Labels of one cluster together, the surest first.
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


# ------------------------------------------------------------------------------ methods


def comparison(table: pd.DataFrame) -> Figure:
    """The model beside the baselines, by what labels say or, without any, by geometry."""
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
        # Most scores end at 1: one scale for them.
        unit = low == 0 and high > 0.3
        ax.set_xlim(low - room * (low < 0), 1.2 if unit else high + room + 0.01)
        ax.set_title(title, fontsize="medium")
        style_axes(ax)
    figure.suptitle(f"The model and the baselines (n = {table['n'].iloc[0]:,}, those trained on)")
    return figure


# ------------------------------------------------------------------------------ shared


def few_valued(samples: pd.DataFrame) -> list[str]:
    """The label columns of a table of samples with few enough values to tell them apart."""
    # Those that begin with "cluster" are what the model and the baselines found.
    own = ("id", "split", "confidence")
    labels = [c for c in samples if c not in own and not c.startswith("cluster")]
    return [label for label in labels if 2 <= samples[label].nunique() <= MAX_KINDS]
