"""The stage that draws the figures of a run: clusters, curves, use of experts, error rates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

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
    """Draw what earlier stages left; a figure whose numbers are not there is left out.

    `clusters`: a map of the extracted vectors by cluster, stratum and speaker.
    ``curves_<stage>``: every stage that trained something. `expert_use`: which experts told the
    clips of each stratum. `wer`: error rates of each method and stratum, with intervals over
    speakers.
    """

    umap: bool = True
    dpi: int = 120
    split: str = "test"

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return how many figures there are."""
        return save_figures(run, self.draw(run), self.dpi)

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives."""
        return {"figures"}

    def draw(self, run: "Context") -> Iterator[tuple[str, Figure]]:
        """Draw every figure there are numbers for, and name it."""
        if run.has("clusters.csv"):
            table = run.load("clusters.csv")
            own = (table["split"] == "train").to_numpy()
            vectors = np.load(run.find("pooled.npy"), mmap_mode="r")[own]
            yield "clusters", cluster_map(vectors, table[own], run.seed if self.umap else None)
        for stage, rows in histories(run).items():
            yield f"curves_{stage}", curves(stage, rows)
        if run.has("expert_use.csv"):
            use = run.load("expert_use.csv")
            yield "expert_use", expert_use(use[use["split"] == self.split], self.split)
        if run.has("wer.csv"):
            table = run.load("wer.csv")
            yield "wer", error_rates(table[table["split"] == self.split], self.split)


def cluster_map(vectors: Array, table: pd.DataFrame, seed: int | None) -> Figure:
    """Vectors (n, width) in two dimensions, by PCA and UMAP (not without a seed), in colours of
    cluster, stratum and speaker; of more than twenty kinds none is named.
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
    some = f"{len(rows):,} of " if len(rows) < len(vectors) else ""
    figure.suptitle(f"Mean encoder states of training clips (n = {some}{len(vectors):,})")
    return figure


def histories(run: "Context") -> dict[str, dict[str, pd.DataFrame]]:
    """The epochs of every fit of every stage: stage -> fit -> a row for each epoch."""
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for result in run.stages:
        names = [result.name, *(f"{result.name}_{n}" for n in ("shared", "dense", *range(64)))]
        rows = {name: history for name in names if len(history := run.history(name))}
        if rows:
            found[result.name] = rows
    return found


def curves(stage: str, fits: dict[str, pd.DataFrame]) -> Figure:
    """Every number of a stage's fits over their epochs: train in thin, val in thick lines."""
    columns = {c: None for rows in fits.values() for c in rows if c.startswith(("train_", "val_"))}
    numbers = list(dict.fromkeys(column.partition("_")[2] for column in columns)) or ["loss"]
    figure = Figure((0.8 + 4.2 * len(numbers), 3.6), layout="constrained")
    axes = figure.subplots(1, len(numbers), squeeze=False)[0]
    for ax, number in zip(axes, numbers, strict=True):
        for place, (name, rows) in enumerate(fits.items()):
            colour = (BLUE, *COLOURS[1:])[place % len(COLOURS)]
            own = name.removeprefix(f"{stage}_") if len(fits) > 1 else ""
            line(ax, rows, f"train_{number}", f"{own} train".strip(), colour, 1.0, "--")
            line(ax, rows, f"val_{number}", f"{own} val".strip(), colour, 1.8, "-")
        ax.set(title=number, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        style_axes(ax)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{stage}: training")
    return figure


def line(
    ax: Axes, rows: pd.DataFrame, column: str, label: str, colour: str, width: float, style: str
) -> None:
    """One number over the epochs in which it was measured."""
    if column in rows and (known := rows[["epoch", column]].dropna()).size:
        ax.plot(known["epoch"], known[column], style, color=colour, lw=width, label=label)


def expert_use(use: pd.DataFrame, split: str) -> Figure:
    """The share of each stratum's clips that each expert told."""
    shares = use.set_index("stratum")[[c for c in use if c.startswith("expert_")]]
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
    ax.set_title(f"Use of experts ({split}, n = {int(use['clips'].max()):,} clips)")
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
