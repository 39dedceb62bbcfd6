"""The charts of a report. Each function returns one chart as SVG."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from stagesweep.sweep.report.comparison import Comparison
from stagesweep.sweep.report.loading import Sweep, Trial, drawable
from stagesweep.sweep.report.svg import (
    ACCENT,
    BAD,
    BEST,
    INK,
    MUTED,
    RANKS,
    SERIES,
    draw_points,
    plain_ticks,
    render_svg,
    scale_axis,
    shorten,
)
from stagesweep.sweep.report.text import format_value

# The link to a trial's folder.
Link = Callable[[Trial], str]


def best_so_far(sweep: Sweep, objective: int = 0) -> list[float]:
    """The best value up to each `drawable` trial; NaN before the first feasible one."""
    better = np.fmax if sweep.maximise[objective] else np.fmin
    trials = drawable(sweep, objective)
    values = [trial.values[objective] if trial.feasible else math.nan for trial in trials]
    return [float(value) for value in better.accumulate(values)]


def history(sweep: Sweep, objective: int, link: Link, width: float = 480) -> Markup:
    """The objective by trial, and the best so far."""
    trials = drawable(sweep, objective)
    values = [trial.values[objective] for trial in trials]
    numbers = [trial.number for trial in trials]

    def draw(axes: Axes) -> None:
        best = best_so_far(sweep, objective)
        axes.step(numbers, best, where="post", color=BEST, linewidth=1.8, label="best so far")
        for feasible, name, colour in ((True, "trial", ACCENT), (False, "infeasible", MUTED)):
            chosen = [trial for trial in trials if trial.feasible is feasible]
            x, y = [t.number for t in chosen], [t.values[objective] for t in chosen]
            if chosen:
                draw_points(axes, x, y, [link(t) for t in chosen], colour, label=name)
        scale_axis(axes, values)
        for state, colour in (("pruned", MUTED), ("failed", BAD)):
            found = [trial.number for trial in sweep.trials if trial.state == state]
            if found:
                below = axes.get_xaxis_transform()
                (ticks,) = axes.plot(found, [0.0] * len(found), "|", label=state, transform=below)
                ticks.set(markersize=9, markeredgewidth=1.6, color=colour, clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set(xlabel="trial", ylabel=shorten(sweep.objectives[objective]))
        axes.figure.legend(loc="outside upper center", ncols=4)

    return render_svg(draw, f"{sweep.objectives[objective]} by trial, and the best so far", width)


def compare_histories(sweeps: Mapping[str, Sweep]) -> Markup:
    """The best so far of several sweeps with the same objective."""

    def draw(axes: Axes) -> None:
        everything: list[float] = []
        for place, (name, sweep) in enumerate(sweeps.items()):
            best = best_so_far(sweep)
            colour = SERIES[place % len(SERIES)]
            style = ("-", "--", ":", "-.")[place // len(SERIES) % 4]
            count = range(1, len(best) + 1)
            axes.step(count, best, where="post", color=colour, ls=style, lw=1.8, label=name)
            axes.plot(count[-1:], best[-1:], "o", color=colour, ms=5)
            everything += [value for value in best if math.isfinite(value)]
        scale_axis(axes, everything)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set(
            xlabel="finished trials", ylabel=shorten(next(iter(sweeps.values())).objectives[0])
        )
        axes.figure.legend(loc="outside upper center", ncols=3)

    return render_svg(draw, "the best so far of each sweep", width=720)


def bar_chart(shares: Mapping[str, float], label: str) -> Markup:
    """Shares of a whole, largest first."""
    names, values = list(shares)[::-1], list(shares.values())[::-1]

    def draw(axes: Axes) -> None:
        axes.barh(range(len(names)), values, color=ACCENT, height=0.6)
        for place, value in enumerate(values):
            axes.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), [shorten(name, 40) for name in names])
        axes.set_xlim(0, max([*values, 0.1]) * 1.15)
        axes.grid(axis="y", visible=False)
        axes.spines.left.set_visible(False)
        plain_ticks(axes.xaxis)

    return render_svg(draw, label, height=56 + 24 * len(names))


def axis_positions(
    values: Sequence[Any], distribution: BaseDistribution
) -> tuple[list[float], list[str]]:
    """The positions of values on an axis, and the names of the ticks of choices."""
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        return [float(choices.index(v)) for v in values], [
            format_value(choice) for choice in choices
        ]
    return [float(value) for value in values], []


def newest_distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    """The distribution of each parameter in the newest trial that has it."""
    found: dict[str, BaseDistribution] = {}
    frozen: Sequence[FrozenTrial] = sweep.study.get_trials(deepcopy=False)
    for trial in frozen:
        found |= trial.distributions
    return {name: found[name] for name in sweep.parameters}


def slice_plot(sweep: Sweep, parameter: str, objective: int, link: Link) -> Markup:
    """The objective against one parameter, with the best trial highlighted."""
    trials = [trial for trial in drawable(sweep, objective) if parameter in trial.params]
    distribution = newest_distributions(sweep)[parameter]
    values = [trial.values[objective] for trial in trials]
    x, names = axis_positions([trial.params[parameter] for trial in trials], distribution)
    best = {trial.number for trial in sweep.ranked(objective)[:1]}

    def draw(axes: Axes) -> None:
        if names:
            spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(x))
            axes.set_xticks(range(len(names)), [shorten(name, 14) for name in names])
            axes.set_xlim(-0.5, len(names) - 0.5)
            if len(names) > 5 or max(map(len, names)) > 8:
                axes.tick_params(axis="x", rotation=35)
        else:
            spread = np.zeros(len(x))
            log = bool(getattr(distribution, "log", False))
            if log:
                axes.set_xscale("log")
        places = [float(value) for value in np.add(x, spread)]
        draw_points(axes, places, values, [link(trial) for trial in trials])
        for trial, place, value in zip(trials, places, values, strict=True):
            if trial.number in best:
                draw_points(axes, [place], [value], [link(trial)], BEST, 60, 1)
        if not names:
            plain_ticks(axes.xaxis, log)
        scale_axis(axes, values)
        axes.set(xlabel=shorten(parameter, 44), ylabel=shorten(sweep.objectives[objective], 28))

    return render_svg(draw, f"{sweep.objectives[objective]} by {parameter}", 360, 240)


def parallel_coordinates(sweep: Sweep, objective: int) -> Markup:
    """Each complete trial as a line across its parameters and its objective."""
    found = newest_distributions(sweep)
    trials = [t for t in drawable(sweep, objective) if all(name in t.params for name in found)]
    order = sweep.ranked(objective)
    rank = {trial.number: place / max(len(order), 1) for place, trial in enumerate(order)}
    columns, ticks = [], []
    for name, distribution in found.items():
        values, names = axis_positions([trial.params[name] for trial in trials], distribution)
        column, marks = _to_unit(values, names, bool(getattr(distribution, "log", False)))
        columns.append(column)
        ticks.append(marks)
    column, marks = _to_unit([trial.values[objective] for trial in trials], [], False)
    lines = np.array([*columns, column]).T
    labels = [*found, sweep.objectives[objective]]

    def draw(axes: Axes) -> None:
        levels = [min(int(rank[t.number] * len(RANKS)), len(RANKS) - 1) for t in trials]
        for level in reversed(range(len(RANKS))):
            chosen = [line for line, own in zip(lines, levels, strict=True) if own == level]
            strength = (1.0, 0.75, 0.6, 0.5, 0.4)[level]
            segments = [np.column_stack([range(len(labels)), line]) for line in chosen]
            axes.add_collection(
                LineCollection(segments, colors=RANKS[level], lw=2 - 0.3 * level, alpha=strength)
            )
        for place, beside in enumerate([*ticks, marks]):
            axes.axvline(place, color=MUTED, linewidth=0.8)
            for height, text in beside:
                axes.text(
                    place + 0.02, height, shorten(text, 16), fontsize=8, color=INK, va="center"
                )
        axes.set_xticks(range(len(labels)), [_wrap_name(label) for label in labels])
        axes.set(xlim=(-0.15, len(labels) - 0.6), ylim=(-0.05, 1.05), yticks=[])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return render_svg(
        draw, "parameters and objective of every trial", max(640, 150 * len(labels)), 300
    )


def _to_unit(
    values: Sequence[float], names: Sequence[str], log: bool
) -> tuple[list[float], list[tuple[float, str]]]:
    """Scale values to [0, 1]. Also returns (height, text) of each tick."""
    if names:
        top = max(len(names) - 1, 1)
        marks = [(place / top, name) for place, name in enumerate(names)]
        return [value / top for value in values], marks[:: max(len(marks) // 12, 1)]
    known = np.log(values) if log else np.asarray(values, dtype=float)
    low, high = known.min(), known.max()
    width = (high - low) or 1.0
    heights = (0.0, 0.25, 0.5, 0.75, 1.0) if high > low else (0.0,)
    at = [low + height * width for height in heights]
    texts = [f"{math.exp(value) if log else value:.3g}" for value in at]
    return list((known - low) / width), list(zip(heights, texts, strict=True))


def _wrap_name(name: str, width: int = 20) -> str:
    """A dotted name on several lines."""
    lines = [""]
    for part in re.split(r"(?<=[._/])", name):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(shorten(line, 24) for line in lines[-3:])


def pareto_front(sweep: Sweep, first: int, second: int, link: Link) -> Markup:
    """Two objectives against each other, with the Pareto front."""
    trials = [trial for trial in drawable(sweep, first) if math.isfinite(trial.values[second])]
    best = {trial.number for trial in sweep.front}

    def draw(axes: Axes) -> None:
        for label, chosen, colour in (
            ("other trials", [t for t in trials if t.number not in best], MUTED),
            ("Pareto front", [t for t in trials if t.number in best], BEST),
        ):
            chosen.sort(key=lambda trial: trial.values[first])
            x = [trial.values[first] for trial in chosen]
            y = [trial.values[second] for trial in chosen]
            if colour == BEST and len(sweep.objectives) == 2:
                where: Literal["pre", "post"] = "pre" if sweep.maximise[first] else "post"
                axes.step(x, y, where=where, color=BEST, linewidth=1.2, alpha=0.6)
            draw_points(
                axes,
                x,
                y,
                [link(t) for t in chosen],
                colour,
                26 + 18 * (colour == BEST),
                0.8,
                label,
            )
        scale_axis(axes, [trial.values[first] for trial in trials], "x")
        scale_axis(axes, [trial.values[second] for trial in trials])
        axes.set(xlabel=sweep.objectives[first], ylabel=shorten(sweep.objectives[second]))
        axes.figure.legend(loc="outside upper center", ncols=2)

    return render_svg(draw, f"{sweep.objectives[first]} against {sweep.objectives[second]}")


def forest_plot(comparison: Comparison, label: str) -> Markup:
    """The differences from the baseline with their 95 % intervals."""
    others = [p for p in comparison.points if p is not comparison.baseline][:40][::-1]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, point in enumerate(others):
            found = point.minus(comparison.baseline)
            clear = found.low > 0 or found.high < 0
            colour = ACCENT if clear else MUTED
            if math.isfinite(found.low):
                axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
            axes.plot([found.mean], [place], "o", color=colour, ms=6)
        axes.set_yticks(range(len(others)), [shorten(point.name, 40) for point in others])
        axes.set(xlabel=label, ylim=(-0.6, len(others) - 0.4))
        axes.spines.left.set_visible(False)
        plain_ticks(axes.xaxis)

    return render_svg(draw, label, 640, 60 + 24 * len(others))


Curve = tuple[Sequence[float], Sequence[float]]


def learning_curves(
    grey: Sequence[Curve], top: Mapping[str, Sequence[Curve]], names: tuple[str, str]
) -> Markup:
    """Curves over epochs or steps: the best trials in colour, all others in grey."""

    def draw(axes: Axes) -> None:
        for x, y in grey:
            axes.plot(x, y, color=MUTED, linewidth=0.8, alpha=0.35)
        for place, (label, lines) in reversed(list(enumerate(top.items()))):
            for count, (x, y) in enumerate(lines):
                axes.plot(
                    x,
                    y,
                    color=SERIES[place % len(SERIES)],
                    linewidth=1.6,
                    marker="o" if len(x) == 1 else None,
                    label=label if not count else None,
                )
        scale_axis(
            axes, [v for _, y in [*grey, *(c for cs in top.values() for c in cs)] for v in y]
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set(xlabel=names[0], ylabel=shorten(names[1]))
        if top:
            handles, labels = axes.get_legend_handles_labels()
            axes.figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=5)

    return render_svg(draw, f"{names[1]} by {names[0]}")
