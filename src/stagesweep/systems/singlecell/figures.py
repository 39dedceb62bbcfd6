"""Stage that draws the figures of cells and patients."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import auc, roc_curve

from stagesweep.data.labels import label_names
from stagesweep.metric.classification import BINS, calibration_error
from stagesweep.stage.plotting import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    MAX_KINDS,
    MAX_POINTS,
    ORANGE,
    heatmap,
    pca_projection,
    save_figures,
    scatter,
    style_axes,
    umap_projection,
)
from stagesweep.systems.singlecell.metric import concordance_correlation

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]


@dataclass
class CellFigures:
    """Draw the artifacts of earlier stages; figures without data are skipped.

    Cells: an embedding coloured by type, donor and condition, and a confusion matrix. Patients:
    proportions, calibration of `label` and ROC curves, from the predictions on held-out folds.
    """

    label: str = "condition"
    umap: bool = True
    dpi: int = 120

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the number of figures."""
        return save_figures(run, self.draw(run), self.dpi)

    def metric_names(self) -> set[str] | None:
        """Names of the metrics of this stage."""
        return {"figures"}

    def draw(self, run: "Context") -> Iterator[tuple[str, Figure]]:
        """Iterate over the names and figures for which there are data."""
        if run.has("embeddings.npz") and run.has("cells.csv"):
            means, cells = run.load("embeddings.npz"), run.load("cells.csv")
            ordered = np.concatenate([means[f"{s}/mean"] for s in cells["split"].unique()])
            yield "cells", embedding_map(ordered, cells, run.seed if self.umap else None)
        if run.has("predictions.csv"):
            predictions = run.load("predictions.csv")
            yield (
                "confusion",
                confusion_figure(predictions[predictions["split"] == "test"].dropna()),
            )
        if not run.has("out_of_fold.npz"):
            return
        found = run.load("out_of_fold.npz")
        if "model/input/proportions" in found:
            names = run.load("pseudobulk.json")["spec"]["features"]["proportions"]["names"]
            yield "proportions", proportion_figure(found, names)
        if f"model/{self.label}" in found:
            yield "calibration", calibration_figure(found, self.label)
            names = label_names(run.data, self.label)
            yield "roc", roc_figure(found, self.label, names)


def embedding_map(means: Array, cells: pd.DataFrame, seed: int | None) -> Figure:
    """Draw latent means by PCA and UMAP (only with a seed), coloured by type, donor and condition.

    There is no legend for more than twenty values.
    """
    rows = np.random.default_rng(0).permutation(len(means))[:MAX_POINTS]
    shown = cells.iloc[rows]
    maps = [pca_projection(means[rows])]
    if seed is not None and len(rows) > 3:
        maps.append((umap_projection(means[rows], maps[0][0], seed), "UMAP 1", "UMAP 2"))
    labels = [each for each in ("label", "donor", "condition") if each in cells]
    figure = Figure((1 + 5.2 * len(maps), 0.6 + 4.2 * len(labels)), layout="constrained")
    grid = figure.subplots(len(labels), len(maps), squeeze=False)
    for axes, label in zip(grid, labels, strict=True):
        for ax, (points, *names) in zip(axes, maps, strict=True):
            scatter(ax, points, shown[label], numbered=False)
            ax.set(xlabel=names[0], ylabel=names[1], xticks=[], yticks=[])
            ax.set_title(f"by {'cell type' if label == 'label' else label}")
            style_axes(ax, grid=False)
        if shown[label].nunique() <= MAX_KINDS:
            right: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
            legend = axes[-1].legend(frameon=False, markerscale=2, **right)
            for handle in legend.legend_handles:
                handle.set_alpha(1)
    sample = f"{len(rows):,} of " if len(rows) < len(means) else ""
    figure.suptitle(f"Latent means of cells (n = {sample}{len(means):,})")
    return figure


def confusion_figure(predictions: pd.DataFrame) -> Figure:
    """Draw the confusion matrix of cell types: counts, coloured by the share of the true type."""
    known = ("id", "split", "predicted", "confidence")
    label = next(name for name in predictions if name not in known)
    true, predicted = predictions[label], predictions["predicted"]
    kinds = sorted(set(true) | set(predicted))
    counts = pd.crosstab(true, predicted).reindex(kinds, fill_value=0)
    counts = counts.reindex(columns=kinds, fill_value=0)
    shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    size = 0.62 * len(kinds)
    figure = Figure((4.5 + size, 2.5 + size), layout="constrained")
    ax = figure.subplots()
    heatmap(figure, ax, shares, "share of the true type", vmax=1)
    for (row, column), count in np.ndenumerate(counts.to_numpy()):
        if count:
            colour = "white" if shares.iat[row, column] > 0.6 else "black"
            ax.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    ax.tick_params("x", rotation=60)
    ax.set(xlabel="predicted", ylabel="true")
    accuracy = float((true == predicted).mean())
    ax.set_title(f"Cell types, held out (n = {len(predictions):,}, accuracy {accuracy:.3f})")
    return figure


def proportion_figure(found: dict[str, Array], names: list[str]) -> Figure:
    """Draw predicted against true proportions of held-out donors, for the model and baselines."""
    true = found["model/input/proportions"]
    methods = [key.partition("/")[0] for key in found if key.endswith("/proportions")]
    methods = [m for m in dict.fromkeys(methods) if f"{m}/proportions" in found]
    figure = Figure((2 + 4.4 * len(methods), 4.8), layout="constrained")
    grid = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for ax, method in zip(grid, methods, strict=True):
        predicted = found[f"{method}/proportions"]
        ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
        for kind, name in enumerate(names):
            colour, marker = COLOURS[kind % len(COLOURS)], MARKERS[kind // len(COLOURS) % 4]
            x, y = true[:, kind], predicted[:, kind]
            ax.scatter(x, y, 9, colour, marker, alpha=0.5, lw=0, label=name)
        ax.set(xlabel="true proportion", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        ccc = concordance_correlation(true.ravel(), predicted.ravel())
        ax.set_title(f"{method}: CCC {ccc:.3f}")
        style_axes(ax)
    grid[0].set_ylabel("predicted proportion")
    grid[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2)
    figure.suptitle(f"Proportions of cell types, donors held out (n = {len(true):,})")
    return figure


def calibration_figure(found: dict[str, Array], label: str) -> Figure:
    """Draw accuracy by confidence for each method, and the number of samples by confidence."""
    methods = [m for m in ("model", *baselines(found)) if f"{m}/assignment" in found]
    figure = Figure((5.6, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
    for number, method in enumerate(methods):
        labels, probabilities = found[f"{method}/{label}"], found[f"{method}/assignment"]
        labels, probabilities = labels[labels >= 0], probabilities[labels >= 0]
        confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        filled, count = np.unique(bins, return_counts=True)
        x, y = ([values[bins == b].mean() for b in filled] for values in (confidence, correct))
        colour = (ORANGE, BLUE, *COLOURS)[number]
        error = calibration_error(labels, probabilities)
        top.plot(x, y, "o-", ms=4, color=colour, label=f"{method} (ECE {error:.3f})")
        bottom.step((filled + 0.5) / BINS, count, where="mid", color=colour)
    least = 1 / found["model/assignment"].shape[1]
    top.set(ylabel="accuracy", xlim=(0.9 * least, 1.02), ylim=(-0.02, 1.02))
    top.legend(frameon=False, loc="lower right")
    bottom.set(xlabel="confidence", ylabel="pseudobulks", ylim=(0, None))
    for ax in (top, bottom):
        style_axes(ax)
    top.set_title(f"Calibration of {label}, donors held out")
    return figure


def baselines(found: dict[str, Array]) -> list[str]:
    """Names of the baselines."""
    names = dict.fromkeys(key.partition("/")[0] for key in found if "/" in key)
    return [name for name in names if name != "model"]


def roc_figure(found: dict[str, Array], label: str, names: list[str]) -> Figure:
    """Draw the ROC curve of each fold and of all folds.

    More than two labels are micro-averaged one-vs-rest.
    """
    figure = Figure((5.6, 5.6), layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
    labels, probabilities = found[f"model/{label}"], found["model/assignment"]
    known = labels >= 0
    for number, fold in enumerate(np.unique(found["fold"])):
        rows = known & (found["fold"] == fold)
        colour = COLOURS[number % len(COLOURS)]
        draw_roc(ax, labels[rows], probabilities[rows], f"fold {fold}", colour, 1.2)
    draw_roc(ax, labels[known], probabilities[known], "all folds", "black", 2.5)
    ax.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    ax.legend(frameon=False, loc="lower right", fontsize=9)
    subject = names[1] if len(names) == 2 else f"{label}, one-vs-rest"
    ax.set_title(f"ROC of {subject}: pseudobulks, donors held out")
    style_axes(ax)
    return figure


def draw_roc(
    ax: Axes, labels: Array, probabilities: Array, name: str, colour: str, width: float
) -> None:
    """Draw one curve; a fold with a single label is skipped, because its curve is undefined."""
    if len(np.unique(labels)) < 2:
        return
    true = np.eye(probabilities.shape[1])[labels]
    if probabilities.shape[1] == 2:
        true, probabilities = true[:, 1], probabilities[:, 1]
    false_rate, true_rate, _ = roc_curve(true.ravel(), probabilities.ravel())
    area = auc(false_rate, true_rate)
    ax.plot(false_rate, true_rate, color=colour, lw=width, label=f"{name} ({area:.2f})")
