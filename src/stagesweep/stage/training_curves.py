"""Figure of the learning curves of the fits of a run."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stagesweep.stage.plotting import BLUE, ORANGE, style_axes


def training(histories: dict[str, pd.DataFrame]) -> Figure:
    """Loss, loss terms and learning rate over the epochs, with a column of axes per fit."""
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
    """Plot one quantity over the epochs, on train and val."""
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
