"""Figure of the mean input of each cluster: images, or profiles over the features."""

from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stagesweep.base.spec import Features
from stagesweep.stage.plotting import BLUE, GREY, style_axes


def cluster_profiles(table: pd.DataFrame, column: str, features: Features) -> Figure:
    """Mean input of each cluster: an image, or a profile with its standard deviation."""
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
            plot_profile(ax, profile, everyone, features)
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
    """Mean of each feature over all samples, from the means of the clusters."""
    known = table[table["count"] > 0]
    total = (known["mean"] * known["count"]).groupby(known["feature"], sort=False).sum()
    mean: pd.Series = total / known.groupby("feature", sort=False)["count"].sum()
    return mean


def plot_profile(ax: Axes, profile: pd.DataFrame, everyone: pd.Series, features: Features) -> None:
    """Plot the mean and standard deviation of a cluster, and the mean of all samples in grey."""
    x = np.arange(len(features.names))
    profile = profile.set_index("feature").reindex(features.names)
    apart = np.isin(features.names, features.isolated)
    for part in (~apart, apart) if apart.any() else (~apart,):
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
    """Set ticks, limits and labels of a grid of profiles."""
    first = grid.flat[0]
    first.set_xticks(range(len(features.names)), features.names)
    first.set_ylim(features.low, features.high)
    if features.inverted:
        first.invert_yaxis()
    for number, ax in enumerate(grid.flat[:used]):
        ax.tick_params("x", rotation=60, labelbottom=number + grid.shape[1] >= used)
    for ax in grid[:, 0]:
        ax.set_ylabel(label)
