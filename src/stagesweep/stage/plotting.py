"""Matplotlib helpers and colours for the figure stages."""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from stagesweep.run.context import Context


# The colour-blind safe palette of Okabe & Ito. With four markers: 32 kinds of points.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#B8A800",
)  # fmt: skip

MARKERS = ("o", "^", "s", "D")

BLUE, ORANGE, GREY = COLOURS[0], COLOURS[5], "#8C8C8C"

# Most points of a map, colours of labels, and rows of a heatmap that are still readable.
MAX_POINTS, MAX_KINDS, MAX_ROWS = 3000, 20, 30


def save_figures(
    run: "Context", figures: Iterator[tuple[str, Figure]], dpi: int
) -> dict[str, float]:
    """Save each figure as soon as it is drawn; returns ``figures``, their number."""
    names = []
    with threadpool_limits(limits=1):
        for name, figure in run.progress(figures, "figures"):
            run.figure(f"{name}.png", figure, dpi)
            names.append(name)
    run.log.info("%s: %s", run.stage, ", ".join(names) or "nothing to draw")
    return {"figures": len(names)}


def pca_projection(means: NDArray[np.floating]) -> tuple[NDArray[np.floating], str, str]:
    """First two principal components (n, 2) of the means (n, d), and two axis labels."""
    pca = PCA(2, random_state=0)
    points = pca.fit_transform(means)
    first, second = pca.explained_variance_ratio_
    return points, f"PC 1 ({first:.0%} of variance)", f"PC 2 ({second:.0%} of variance)"


def umap_projection(
    means: NDArray[np.floating], start: NDArray[Any], seed: int
) -> NDArray[np.floating]:
    """UMAP (n, 2) of the means (n, d) (McInnes et al. 2018), initialised with `start` (n, 2).

    The neighbours come from scikit-learn: UMAP's own search takes many seconds to compile.
    """
    near = min(15, len(means) - 1)
    distances, rows = NearestNeighbors(n_neighbors=near).fit(means).kneighbors(means)
    with warnings.catch_warnings():
        # umap and numba warn about their own internals.
        warnings.simplefilter("ignore")
        from umap import UMAP  # takes seconds to import

        umap = UMAP(
            n_neighbors=near,
            precomputed_knn=(rows, distances, None),
            force_approximation_algorithm=True,
            init=start.astype(np.float32),
            n_epochs=200,
            n_jobs=1,
            random_state=seed % 2**32,
        )
        points: NDArray[np.floating] = umap.fit_transform(means)
    return points


def scatter(ax: Axes, points: NDArray[Any], kinds: pd.Series, numbered: bool) -> None:
    """Scatter points with a colour and marker for each kind; `numbered` annotates the kinds."""
    for number, kind in enumerate(sorted(kinds.dropna().unique())):
        own = points[(kinds == kind).to_numpy()]
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        ax.scatter(
            own[:, 0], own[:, 1], s=7, alpha=0.6, lw=0, color=colour, marker=marker, label=str(kind)
        )
        if numbered:
            ax.annotate(
                str(kind),
                np.median(own, axis=0),
                ha="center",
                va="center",
                weight="bold",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )


def heatmap(figure: Figure, ax: Axes, values: pd.DataFrame, legend: str, vmax: float) -> None:
    """Draw a labelled matrix with a colour bar."""
    image = ax.imshow(values.to_numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=vmax)
    ax.set_xticks(range(values.shape[1]), values.columns)
    ax.set_yticks(range(len(values)), values.index)
    beyond = "max" if values.max(axis=None) > vmax else "neither"
    figure.colorbar(image, label=legend, extend=beyond)


def style_axes(ax: Axes, grid: bool = True) -> None:
    """Hide the top and right spines, and draw a light grid."""
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(alpha=0.25, lw=0.6)
        ax.set_axisbelow(True)
