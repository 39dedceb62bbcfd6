"""Draws charts as SVG for a page. Text stays text, and colours come from the page's style sheet.

matplotlib draws with placeholder colours, which `render_svg` replaces by CSS variables. One chart
therefore suits the light and the dark style.
"""

import math
import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stagesweep.sweep.report.loading import LARGEST

Floats = Sequence[float]

# Placeholder colours, and the CSS variables that replace them.
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


def render_svg(
    draw: Callable[[Axes], None], label: str, width: float = 480, height: float = 270
) -> Markup:
    """Render what `draw` draws. `label` is the accessible name; sizes are in points."""
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
    """Make the ids of a tag unique on the page, and use the page's colours."""
    tag = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\1{prefix}", tag)
    return re.sub(r"#0[0-9a-f]{5}", lambda found: _COLOURS.get(found[0], found[0]), tag)


def plain_ticks(axis: Any, log: bool = False) -> None:
    """Show ticks as plain numbers."""
    if log:
        low, high = axis.get_view_interval()
        decades = math.log10(high / low) if low > 0 else 1
        subs = (
            (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.6 else tuple(range(1, 10))
        )
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def scale_axis(axes: Axes, values: Sequence[float], which: str = "y") -> None:
    """Use a logarithmic axis when positive values span more than two decades."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    known = [value for value in values if math.isfinite(value)]
    log = bool(known) and min(known) > 1 / LARGEST and max(known) > 100 * min(known)
    if log:
        (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    plain_ticks(axis, log)


def shorten(name: str, length: int = 34) -> str:
    """The end of a long name."""
    return name if len(name) <= length else "…" + name[1 - length :]


def draw_points(
    axes: Axes,
    x: Floats,
    y: Floats,
    links: Sequence[str],
    color: str = ACCENT,
    size: float = 26,
    alpha: float = 0.75,
    label: str = "",
) -> None:
    """Draw points that link to their trials."""
    dots = axes.scatter(x, y, s=size, c=color, alpha=alpha, linewidths=0, label=label)
    dots.set_urls(list(links))
