"""Stage that draws the figures of a run: clusters, curves, usage of experts, error rates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from stagesweep.config.schema import bounded
from stagesweep.stage.plotting import (
    BLUE,
    COLOURS,
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

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]


@dataclass
class SpeechFigures:
    """Draw the artifacts of earlier stages; figures without data are skipped.

    `clusters`: a map of the extracted vectors by cluster, stratum and speaker.
    ``curves_<stage>``: metrics of each fit over epochs. `expert_use`: share of the clips of each
    stratum decoded by each expert. `wer`: error rates by method and stratum, with intervals.
    """

    umap: bool = True
    dpi: int = bounded(120, ge=1)
    split: str = "test"

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the number of figures."""
        return save_figures(run, self.draw(run), self.dpi)

    def metric_names(self) -> set[str] | None:
        """Names of the metrics of this stage."""
        return {"figures"}

    def draw(self, run: "Context") -> Iterator[tuple[str, Figure]]:
        """Iterate over the names and figures for which there are data."""
        if run.has("clusters.csv"):
            table = run.load("clusters.csv")
            own = (table["split"] == "train").to_numpy()
            vectors = np.load(run.find("pooled.npy"), mmap_mode="r")[own]
            yield "clusters", cluster_map(vectors, table[own], run.seed if self.umap else None)
        for stage, rows in histories(run).items():
            yield f"curves_{stage}", curves(stage, rows)
        if run.has("expert_use.csv"):
            usage = run.load("expert_use.csv")
            yield "expert_use", expert_usage(usage[usage["split"] == self.split], self.split)
        if run.has("wer.csv"):
            table = run.load("wer.csv")
            yield "wer", error_rates(table[table["split"] == self.split], self.split)


def cluster_map(vectors: Array, table: pd.DataFrame, seed: int | None) -> Figure:
    """Scatter plots of vectors (n, width) by PCA, and UMAP if `seed` is given, coloured by cluster,
    stratum and speaker. There is no legend for more than twenty values.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(vectors))[:MAX_POINTS])
    chosen, shown = np.asarray(vectors[rows], np.float64), table.iloc[rows]
    maps = [pca_projection(chosen)]
    if seed is not None and len(rows) > 3:
        maps.append((umap_projection(chosen, maps[0][0], seed), "UMAP 1", "UMAP 2"))
    labels = ["cluster", "stratum", "speaker"]
    figure = Figure((1.5 + 5.2 * len(maps), 0.6 + 4.2 * len(labels)), layout="constrained")
    grid = figure.subplots(len(labels), len(maps), squeeze=False)
    for axes, label in zip(grid, labels, strict=True):
        for ax, (points, *names) in zip(axes, maps, strict=True):
            scatter(ax, points, shown[label], numbered=label == "cluster")
            ax.set(xlabel=names[0], ylabel=names[1], xticks=[], yticks=[])
            ax.set_title(f"by {label}")
            style_axes(ax, grid=False)
        if shown[label].nunique() <= MAX_KINDS:
            legend = axes[-1].legend(
                frameon=False, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5)
            )
            for handle in legend.legend_handles:
                handle.set_alpha(1)
    sample = f"{len(rows):,} of " if len(rows) < len(vectors) else ""
    figure.suptitle(f"Mean encoder states of training clips (n = {sample}{len(vectors):,})")
    return figure


def histories(run: "Context") -> dict[str, dict[str, pd.DataFrame]]:
    """Return the histories of all fits: stage -> fit -> a row for each epoch."""
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for result in run.stages:
        names = [result.name, *(f"{result.name}_{n}" for n in ("shared", "dense", *range(64)))]
        rows = {name: history for name in names if len(history := run.history(name))}
        if rows:
            found[result.name] = rows
    return found


def curves(stage: str, fits: dict[str, pd.DataFrame]) -> Figure:
    """Metrics of the fits of a stage over epochs; thin lines are train, thick lines val."""
    columns = {c: None for rows in fits.values() for c in rows if c.startswith(("train_", "val_"))}
    metrics = list(dict.fromkeys(column.partition("_")[2] for column in columns)) or ["loss"]
    figure = Figure((0.8 + 4.2 * len(metrics), 3.6), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, metric in zip(axes, metrics, strict=True):
        for place, (name, rows) in enumerate(fits.items()):
            colour = (BLUE, *COLOURS[1:])[place % len(COLOURS)]
            own = name.removeprefix(f"{stage}_") if len(fits) > 1 else ""
            line(ax, rows, f"train_{metric}", f"{own} train".strip(), colour, 1.0, "--")
            line(ax, rows, f"val_{metric}", f"{own} val".strip(), colour, 1.8, "-")
        ax.set(title=metric, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        style_axes(ax)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{stage}: training")
    return figure


def line(
    ax: Axes, rows: pd.DataFrame, column: str, label: str, colour: str, width: float, style: str
) -> None:
    """Draw one metric over the epochs in which it was measured."""
    if column in rows and (known := rows[["epoch", column]].dropna()).size:
        ax.plot(known["epoch"], known[column], style, color=colour, lw=width, label=label)


def expert_usage(usage: pd.DataFrame, split: str) -> Figure:
    """Share of the clips of each stratum decoded by each expert."""
    shares = usage.set_index("stratum")[[c for c in usage if c.startswith("expert_")]]
    shares = shares.rename(columns=lambda name: name.removeprefix("expert_"))
    rows, columns = shares.shape
    figure = Figure((3.5 + 0.7 * columns, 1.6 + 0.5 * rows), layout="constrained")
    ax = figure.subplots()
    heatmap(figure, ax, shares, "share of the stratum's clips", vmax=1)
    for (row, column), share in np.ndenumerate(shares.to_numpy()):
        if share >= 0.005:
            colour = "white" if share > 0.6 else "black"
            ax.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=8)
    ax.set(xlabel="expert", ylabel="stratum")
    ax.set_title(f"Usage of experts ({split}, n = {int(usage['clips'].max()):,} clips)")
    return figure


def error_rates(table: pd.DataFrame, split: str) -> Figure:
    """Word error rates in percent of each stratum and method, with intervals over speakers."""
    strata, methods = list(dict.fromkeys(table["stratum"])), list(dict.fromkeys(table["method"]))
    figure = Figure((2.5 + 0.45 * len(strata) * len(methods), 4.6), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        own = table[table["method"] == method].set_index("stratum").reindex(strata)
        places = np.arange(len(strata)) + (number - (len(methods) - 1) / 2) * width
        spread = np.abs(own[["wer_low", "wer_high"]].to_numpy().T - own["wer"].to_numpy()) * 100
        colour = (ORANGE, BLUE, *COLOURS[1:])[number % 8]
        ax.bar(places, own["wer"] * 100, width * 0.9, color=colour, label=method, zorder=2)
        ax.errorbar(places, own["wer"] * 100, spread, fmt="none", color="black", lw=1, zorder=3)
    ax.set_xticks(range(len(strata)), strata)
    ax.set(ylabel="word error rate in %", ylim=(0, None))
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_title(f"Word error rates ({split}), 95 % intervals over speakers")
    style_axes(ax)
    return figure
