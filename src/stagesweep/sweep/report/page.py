"""``report.html``, one file that needs no network, and the command ``stagesweep-report``."""

import argparse
import base64
import hashlib
import logging
import math
import os
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text
from stagesweep.sweep.report import charts, curves
from stagesweep.sweep.report.comparison import Comparison, comparisons
from stagesweep.sweep.report.importances import importances, method
from stagesweep.sweep.report.loading import Sweep, Trial, drawable, read
from stagesweep.sweep.report.tables import interval, measured, over_seeds, savings, table
from stagesweep.sweep.report.text import (
    breakable,
    format_duration,
    format_number,
)

log = logging.getLogger(__name__)

HERE = Path(__file__).parent

# The most rows and slice plots of a page. `results_summary.csv` has every trial.
ROWS, SLICES = 500, 24

# Below this number of complete trials importances mean nothing.
ENOUGH = 10

# ------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status."""
    options = _parser().parse_args(arguments)
    folders = [Path(name) for name in options.folders]
    output = Path(options.output) if options.output else default_output(folders)
    try:
        write([read(folder) for folder in folders], output)
    except UserError as error:
        print(f"stagesweep-report: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(output)
    if options.open == "yes" or (options.open is None and _at_a_desktop()):
        webbrowser.open(output.absolute().as_uri())
    return 0


def default_output(folders: Sequence[Path]) -> Path:
    """The default path: in the folder of one sweep; of several, in the current folder."""
    return folders[0] / "report.html" if len(folders) == 1 else Path("report.html")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagesweep-report",
        description="Write report.html of a sweep, running or ended, or of several side by side.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a sweep")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: report.html in DIR; of several sweeps, in this folder",
    )
    parser.add_argument(
        "--open",
        choices=("yes", "no"),
        help="whether a browser shows it (default: at a terminal of a desktop)",
    )
    return parser


def _at_a_desktop() -> bool:
    screen = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return sys.stdout.isatty() and (screen or sys.platform == "darwin")


# ------------------------------------------------------------------------------ the page


def write(sweeps: Sequence[Sweep], output: Path) -> None:
    """Write the report of some sweeps, atomically."""
    atomic_text(output, page(sweeps, output.parent))


def write_or_warn(folder: Path) -> None:
    """Write the report of a sweep that ends. An error is logged, and does not stop the sweep."""
    try:
        write([read(folder)], folder / "report.html")
    except Exception as error:
        again = f"stagesweep-report {folder}"
        log.warning("no report.html: %s; try: %s", str(error) or repr(error), again)


def page(sweeps: Sequence[Sweep], place: Path) -> str:
    """Render the report as HTML. Links to trials are relative to the folder `place`."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = [_Section(sweep, f"s{n}", place) for n, sweep in enumerate(sweeps)]
    return environment.get_template("report.html.j2").render(
        parts=parts,
        together=compared_histories(parts),
        style=Markup((HERE / "report.css").read_text()),
        script=Markup(script),
        digest=digest,
        now=datetime.now(),
        duration=format_duration,
        number=format_number,
        measured=measured,
        method=method,
        folded=breakable,
    )


def compared_histories(parts: Sequence["_Section"]) -> Markup | None:
    """The histories of several sweeps in one chart, when they have the same single objective."""
    aims = {(*part.sweep.objectives, *part.sweep.maximise) for part in parts}
    drawn = {part.title: part.sweep for part in parts if drawable(part.sweep)}
    if len(parts) < 2 or len(aims) > 1 or len(drawn) < 2 or len(parts[0].sweep.objectives) > 1:
        return None
    return charts.compare_histories(drawn)


@dataclass
class _Section:
    """The section of one sweep."""

    sweep: Sweep
    id: str
    place: Path

    @property
    def title(self) -> str:
        """Experiment and study."""
        return " · ".join(filter(None, (self.sweep.experiment, self.sweep.folder.absolute().name)))

    def to(self, path: Path) -> str:
        """A relative link to a file or folder."""
        return quote(Path(os.path.relpath(path.absolute(), self.place.absolute())).as_posix())

    def link(self, trial: Trial) -> str:
        """A relative link to a trial's folder."""
        return self.to(trial.folder) + "/"

    @cached_property
    def saved(self) -> Any:
        """The time saved by reuse."""
        return savings(self.sweep)

    def best(self, objective: int) -> dict[str, Any] | None:
        """The best value of an objective, its trial, and its interval when it was repeated."""
        ranked = self.sweep.ranked(objective)
        if not ranked or not ranked[0].feasible:
            return None
        found = interval(ranked[0], objective)
        return {
            "trial": ranked[0],
            "value": ranked[0].values[objective],
            "interval": found if math.isfinite(found.low) else None,
        }

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The leaderboard: complete trials by rank, then running and pruned ones."""
        front = {trial.number for trial in self.sweep.front}
        ranked = self.sweep.ranked()
        others = [trial for trial in self.sweep.trials if trial.state in ("running", "pruned")]
        return [
            {
                "trial": trial,
                "rank": place if trial.state == "complete" else None,
                "best": trial.number in front,
                "intervals": [interval(trial, n) for n in range(len(self.sweep.objectives))],
                "last": max(trial.reports.items(), default=None),
            }
            for place, trial in enumerate([*ranked, *others][:ROWS], 1)
        ]

    @cached_property
    def failed(self) -> list[Trial]:
        """The trials that failed, by number."""
        return [trial for trial in self.sweep.trials if trial.state == "failed"]

    @cached_property
    def silent(self) -> float | None:
        """Seconds since a running trial last wrote a file; None when none is running."""
        seen = [
            t.last_activity for t in self.sweep.trials if t.state == "running" and t.last_activity
        ]
        return max((datetime.now() - max(seen)).total_seconds(), 0.0) if seen else None

    @cached_property
    def histories(self) -> list[Markup]:
        """A chart for each objective."""
        count = len(self.sweep.objectives)
        return [
            charts.history(self.sweep, n, self.link, width=480 if count > 1 else 720)
            for n in range(count)
            if drawable(self.sweep, n)
        ]

    def importances(self, objective: int) -> dict[str, float] | str:
        """The importance of each parameter, or why it cannot be computed."""
        count = len(drawable(self.sweep, objective))
        if count < ENOUGH:
            return f"Importances need more trials: {count} of at least {ENOUGH} are complete."
        return importances(self.sweep, objective)

    def bars(self, shares: dict[str, float], objective: int) -> Markup:
        """Importances as a chart."""
        return charts.bar_chart(shares, f"importance for {self.sweep.objectives[objective]}")

    def parallel(self, objective: int) -> Markup | None:
        """Parallel coordinates, when there are several parameters."""
        enough = len(drawable(self.sweep, objective)) > 1 and len(self.sweep.parameters) > 1
        return charts.parallel_coordinates(self.sweep, objective) if enough else None

    def slices(self, objective: int) -> list[Markup]:
        """A slice plot for each parameter."""
        trials = drawable(self.sweep, objective)
        names = [p for p in self.sweep.parameters if any(p in trial.params for trial in trials)]
        return [
            charts.slice_plot(self.sweep, name, objective, self.link) for name in names[:SLICES]
        ]

    @cached_property
    def fronts(self) -> list[Markup]:
        """A Pareto front for each pair of objectives."""
        if not drawable(self.sweep):
            return []
        pairs = combinations(range(len(self.sweep.objectives)), 2)
        return [
            charts.pareto_front(self.sweep, first, second, self.link) for first, second in pairs
        ]

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Comparisons by metric; empty without an ablation and without repeats."""
        return comparisons(self.sweep)

    @cached_property
    def methods(self) -> pd.DataFrame | None:
        """The table of `over_seeds`, when trials differ in their seed only."""
        if self.sweep.parameters != ["seed"]:
            return None
        return over_seeds(table(self.sweep))

    def forest(self, comparison: Comparison, name: str) -> Markup | None:
        """The differences from the baseline as a chart."""
        differences = [p.minus(comparison.baseline).mean for p in comparison.points]
        if len(comparison.points) < 2 or not all(map(math.isfinite, differences)):
            return None
        against = "the full model" if comparison.ablation else "the best"
        return charts.forest_plot(comparison, f"{name}: difference from {against}")

    @cached_property
    def curves(self) -> list[tuple[str, Markup]]:
        """Learning curves of each fit, and of the values reported to the pruner."""
        return [*curves.fits(self.sweep), *curves.reports(self.sweep)]


if __name__ == "__main__":
    sys.exit(main())
