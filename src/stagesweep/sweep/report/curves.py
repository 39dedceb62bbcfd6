"""The learning curves of a sweep: of each fit, and of the values reported to the pruner."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stagesweep.sweep.report import charts
from stagesweep.sweep.report.loading import LARGEST, Sweep, Trial

# The most curves of a chart, and how many of the best trials have a colour.
LINES, TOP = 200, 5


def fits(sweep: Sweep) -> list[tuple[str, Markup]]:
    """For each fit, one metric over its epochs. Runs that share a stored fit have one line."""
    top = sweep.ranked()[:TOP]
    best = {trial.number for trial in top}
    rest = [trial for trial in reversed(sweep.trials) if trial.number not in best]
    seen: set[tuple[str, str]] = set()
    lines: dict[str, list[tuple[Trial, list[dict[str, Any]]]]] = {}
    for trial in [*top, *rest[: LINES - len(top)]]:
        for run in trial.runs:
            keys = _fingerprints(trial, run)
            for stage, rows in _epochs(run).items():
                key = (stage, keys.get(stage, str(run)))
                if key not in seen:
                    seen.add(key)
                    lines.setdefault(stage, []).append((trial, rows))
    found = []
    for stage, runs in lines.items():
        metric = _metric(sweep, stage, runs[0][1])
        if metric is None:
            continue
        grey: list[charts.Curve] = []
        named: dict[str, list[charts.Curve]] = {}
        for trial, rows in runs:
            curve = _thinned([(r["epoch"], r[metric]) for r in rows if r.get(metric) is not None])
            if trial.number in best and len(runs) > 1:
                named.setdefault(f"#{trial.number}", []).append(curve)
            else:
                grey.append(curve)
        if len(runs) == 1 and len(sweep.complete) > 1:
            named, grey = {"shared by all trials": grey}, []
        found.append((stage, charts.learning_curves(grey, named, ("epoch", f"{stage}/{metric}"))))
    return found


def reports(sweep: Sweep) -> list[tuple[str, Markup]]:
    """The values that running trials reported, by step."""
    top = {trial.number for trial in sweep.ranked()[:TOP]} if len(sweep.objectives) == 1 else set()
    drawn = [trial for trial in sweep.trials if trial.reports]
    if not drawn:
        return []
    curve = {t.number: _thinned(sorted(t.reports.items())) for t in drawn[-LINES:]}
    named = {f"#{number}": [line] for number, line in curve.items() if number in top}
    grey = [line for number, line in curve.items() if number not in top]
    return [
        ("reported while training", charts.learning_curves(grey, named, ("step", "reported value")))
    ]


def _fingerprints(trial: Trial, run: Path) -> dict[str, str]:
    """The fingerprint of each finished stage of a run."""
    stages = trial.results.get(run, {}).get("stages", [])
    return {stage["name"]: stage["fingerprint"] for stage in stages}


def _epochs(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The epochs in a run's metrics, by stage, without a half-written line."""
    found: dict[str, list[dict[str, Any]]] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row["kind"] == "epoch":
                found.setdefault(row["stage"], []).append(row)
    return found


def _metric(sweep: Sweep, stage: str, rows: Sequence[dict[str, Any]]) -> str | None:
    """The metric to draw: an objective, or else a loss."""
    have = {name for row in rows for name, value in row.items() if value is not None}
    own = [name.partition("/")[2] for name in sweep.objectives if name.startswith(f"{stage}/")]
    wanted = (*own, *(name.rpartition("/")[2] for name in sweep.objectives))
    return next((n for n in (*wanted, "val_loss", "train_loss") if n in have), None)


def _thinned(points: Sequence[tuple[float, float]], most: int = 300) -> charts.Curve:
    """Thin out the points with finite values, and return x and y."""
    known = [(x, y) for x, y in points if abs(y) < LARGEST]
    step = max(math.ceil(len(known) / most), 1)
    chosen = known[::step] + ([known[-1]] if known and (len(known) - 1) % step else [])
    return [x for x, _ in chosen], [y for _, y in chosen]
