"""The pictures of a report: SVG for a page, whose text stays text and whose colours are the page's.

Each function gives the markup of one picture. Colours are written as stand-ins that `picture`
replaces by the variables of the page's style sheet, so that one picture suits light and dark.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any, Literal

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from stagesweep.sweep.report.loading import Comparison, Sweep, Trial
from stagesweep.sweep.report.tables import shown

Link = Callable[[Trial], str]
Floats = Sequence[float]

# What is larger, or positive and smaller than its inverse, is left out of axes.
LARGEST = 1e100

# Stand-ins, and the variables of the style sheet that they are.
INK, MUTED, LINE, ACCENT, BEST, BAD = (f"#0{n}0{n}0{n}" for n in range(1, 7))
SERIES = tuple(f"#0{n}0a0{n}" for n in range(6))
RANKS = tuple(f"#0{n}0b0{n}" for n in range(5))
_NAMES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", BEST: "best", BAD: "bad"}
_NAMES |= {colour: f"series{n}" for n, colour in enumerate(SERIES)}
_NAMES |= {colour: f"rank{n}" for n, colour in enumerate(RANKS)}
_COLOURS = {colour: f"var(--{name})" for colour, name in _NAMES.items()}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stagesweep",
    "text.parse_math": False,  # names are not formulas
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

_count = 0


def picture(
    draw: Callable[[Axes], None], label: str, width: float = 480, height: float = 270
) -> Markup:
    """The SVG of what `draw` draws, `width` by `height` units, with `label` for who cannot see."""
    global _count
    _count += 1
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure.subplots())
        stream = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<(?:style|metadata).*?</(?:style|metadata)>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0], f"p{_count}-"), text)
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: start, text, count=1))


def _tag(tag: str, prefix: str) -> str:
    """A tag with names of its own on the page, and the page's colours."""
    tag = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\1{prefix}", tag)
    return re.sub(r"#0[0-9a-f]{5}", lambda found: _COLOURS.get(found[0], found[0]), tag)


# ------------------------------------------------------------------------------ axes


def _plain(axis: Any, log: bool = False) -> None:
    """Ticks as plain numbers."""
    if log:
        low, high = axis.get_view_interval()
        decades = math.log10(high / low) if low > 0 else 1
        subs = (
            (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.6 else tuple(range(1, 10))
        )
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _values_axis(axes: Axes, values: Sequence[float], which: str = "y") -> None:
    """A logarithmic axis when positive values span more than two decades."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    known = [value for value in values if math.isfinite(value)]
    log = bool(known) and min(known) > 1 / LARGEST and max(known) > 100 * min(known)
    if log:
        (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    _plain(axis, log)


def _short(name: str, length: int = 34) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def _dots(
    axes: Axes,
    x: Floats,
    y: Floats,
    links: Sequence[str],
    color: str = ACCENT,
    size: float = 26,
    alpha: float = 0.75,
    label: str = "",
) -> None:
    """Points that lead to their trials."""
    dots = axes.scatter(x, y, s=size, c=color, alpha=alpha, linewidths=0, label=label)
    dots.set_urls(list(links))


def finite(sweep: Sweep, objective: int = 0) -> list[Trial]:
    """The complete trials whose objective is a number that can be drawn."""
    return [trial for trial in sweep.complete if abs(trial.values[objective]) < LARGEST]


def best_so_far(sweep: Sweep, objective: int = 0) -> list[float]:
    """The best value up to each of the `finite` trials; NaN before one keeps the constraints."""
    better = np.fmax if sweep.maximise[objective] else np.fmin
    trials = finite(sweep, objective)
    values = [trial.values[objective] if trial.feasible else math.nan for trial in trials]
    return [float(value) for value in better.accumulate(values)]


# ------------------------------------------------------------------------------ pictures


def history(sweep: Sweep, objective: int, link: Link, width: float = 480) -> Markup:
    """Values by trial, and the best so far."""
    trials = finite(sweep, objective)
    values = [trial.values[objective] for trial in trials]
    numbers = [trial.number for trial in trials]

    def draw(axes: Axes) -> None:
        best = best_so_far(sweep, objective)
        axes.step(numbers, best, where="post", color=BEST, linewidth=1.8, label="best so far")
        for feasible, name, colour in ((True, "trial", ACCENT), (False, "infeasible", MUTED)):
            chosen = [trial for trial in trials if trial.feasible is feasible]
            x, y = [t.number for t in chosen], [t.values[objective] for t in chosen]
            if chosen:
                _dots(axes, x, y, [link(t) for t in chosen], colour, label=name)
        _values_axis(axes, values)
        for state, colour in (("pruned", MUTED), ("failed", BAD)):
            found = [trial.number for trial in sweep.trials if trial.state == state]
            if found:
                below = axes.get_xaxis_transform()
                (ticks,) = axes.plot(found, [0.0] * len(found), "|", label=state, transform=below)
                ticks.set(markersize=9, markeredgewidth=1.6, color=colour, clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set(xlabel="trial", ylabel=_short(sweep.objectives[objective]))
        axes.figure.legend(loc="outside upper center", ncols=4)

    return picture(draw, f"{sweep.objectives[objective]} by trial, and the best so far", width)


def histories(sweeps: Mapping[str, Sweep]) -> Markup:
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
        _values_axis(axes, everything)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set(xlabel="finished trials", ylabel=_short(next(iter(sweeps.values())).objectives[0]))
        axes.figure.legend(loc="outside upper center", ncols=3)

    return picture(draw, "the best so far of each sweep", width=720)


def bars(shares: Mapping[str, float], label: str) -> Markup:
    """Shares of a whole, largest first."""
    names, values = list(shares)[::-1], list(shares.values())[::-1]

    def draw(axes: Axes) -> None:
        axes.barh(range(len(names)), values, color=ACCENT, height=0.6)
        for place, value in enumerate(values):
            axes.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), [_short(name, 40) for name in names])
        axes.set_xlim(0, max([*values, 0.1]) * 1.15)
        axes.grid(axis="y", visible=False)
        axes.spines.left.set_visible(False)
        _plain(axes.xaxis)

    return picture(draw, label, height=56 + 24 * len(names))


def place_of(
    values: Sequence[Any], distribution: BaseDistribution
) -> tuple[list[float], list[str]]:
    """Where values lie on an axis; the names of the places when they are choices."""
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        return [float(choices.index(v)) for v in values], [shown(choice) for choice in choices]
    return [float(value) for value in values], []


def distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    """What each parameter may be, as the newest trial that has it says."""
    found: dict[str, BaseDistribution] = {}
    frozen: Sequence[FrozenTrial] = sweep.study.get_trials(deepcopy=False)
    for trial in frozen:
        found |= trial.distributions
    return {name: found[name] for name in sweep.parameters}


def slice_of(sweep: Sweep, parameter: str, objective: int, link: Link) -> Markup:
    """The objective against one parameter; the best trial stands out."""
    trials = [trial for trial in finite(sweep, objective) if parameter in trial.params]
    distribution = distributions(sweep)[parameter]
    values = [trial.values[objective] for trial in trials]
    x, names = place_of([trial.params[parameter] for trial in trials], distribution)
    best = {trial.number for trial in sweep.ranked(objective)[:1]}

    def draw(axes: Axes) -> None:
        if names:
            spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(x))
            axes.set_xticks(range(len(names)), [_short(name, 14) for name in names])
            axes.set_xlim(-0.5, len(names) - 0.5)
            if len(names) > 5 or max(map(len, names)) > 8:
                axes.tick_params(axis="x", rotation=35)
        else:
            spread = np.zeros(len(x))
            log = bool(getattr(distribution, "log", False))
            if log:
                axes.set_xscale("log")
        places = [float(value) for value in np.add(x, spread)]
        _dots(axes, places, values, [link(trial) for trial in trials])
        for trial, place, value in zip(trials, places, values, strict=True):
            if trial.number in best:
                _dots(axes, [place], [value], [link(trial)], BEST, 60, 1)
        if not names:
            _plain(axes.xaxis, log)
        _values_axis(axes, values)
        axes.set(xlabel=_short(parameter, 44), ylabel=_short(sweep.objectives[objective], 28))

    return picture(draw, f"{sweep.objectives[objective]} by {parameter}", 360, 240)


def parallel(sweep: Sweep, objective: int) -> Markup:
    """Every complete trial as a line across its parameters and its objective."""
    found = distributions(sweep)
    trials = [t for t in finite(sweep, objective) if all(name in t.params for name in found)]
    order = sweep.ranked(objective)
    rank = {trial.number: place / max(len(order), 1) for place, trial in enumerate(order)}
    columns, ticks = [], []
    for name, distribution in found.items():
        values, names = place_of([trial.params[name] for trial in trials], distribution)
        column, marks = _unit(values, names, bool(getattr(distribution, "log", False)))
        columns.append(column)
        ticks.append(marks)
    column, marks = _unit([trial.values[objective] for trial in trials], [], False)
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
                    place + 0.02, height, _short(text, 16), fontsize=8, color=INK, va="center"
                )
        axes.set_xticks(range(len(labels)), [_folded(label) for label in labels])
        axes.set(xlim=(-0.15, len(labels) - 0.6), ylim=(-0.05, 1.05), yticks=[])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return picture(
        draw, "parameters and objective of every trial", max(640, 150 * len(labels)), 300
    )


def _unit(
    values: Sequence[float], names: Sequence[str], log: bool
) -> tuple[list[float], list[tuple[float, str]]]:
    """Values between 0 and 1, and (height, text) of the marks beside the axis."""
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


def _folded(name: str, width: int = 20) -> str:
    """A dotted name on several lines."""
    lines = [""]
    for part in re.split(r"(?<=[._/])", name):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(_short(line, 24) for line in lines[-3:])


def front(sweep: Sweep, first: int, second: int, link: Link) -> Markup:
    """Two objectives against each other, with the trials that none is better than."""
    trials = [trial for trial in finite(sweep, first) if math.isfinite(trial.values[second])]
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
            _dots(
                axes,
                x,
                y,
                [link(t) for t in chosen],
                colour,
                26 + 18 * (colour == BEST),
                0.8,
                label,
            )
        _values_axis(axes, [trial.values[first] for trial in trials], "x")
        _values_axis(axes, [trial.values[second] for trial in trials])
        axes.set(xlabel=sweep.objectives[first], ylabel=_short(sweep.objectives[second]))
        axes.figure.legend(loc="outside upper center", ncols=2)

    return picture(draw, f"{sweep.objectives[first]} against {sweep.objectives[second]}")


def forest(comparison: Comparison, label: str) -> Markup:
    """Differences from the baseline with their intervals."""
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
        axes.set_yticks(range(len(others)), [_short(point.name, 40) for point in others])
        axes.set(xlabel=label, ylim=(-0.6, len(others) - 0.4))
        axes.spines.left.set_visible(False)
        _plain(axes.xaxis)

    return picture(draw, label, 640, 60 + 24 * len(others))


Curve = tuple[Sequence[float], Sequence[float]]


def curves(
    grey: Sequence[Curve], top: Mapping[str, Sequence[Curve]], names: tuple[str, str]
) -> Markup:
    """Lines over epochs or steps: the best trials in colour, all others in grey."""

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
        _values_axis(
            axes, [v for _, y in [*grey, *(c for cs in top.values() for c in cs)] for v in y]
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set(xlabel=names[0], ylabel=_short(names[1]))
        if top:
            handles, labels = axes.get_legend_handles_labels()
            axes.figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=5)

    return picture(draw, f"{names[1]} by {names[0]}")
