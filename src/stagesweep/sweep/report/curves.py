"""The learning curves of a sweep: of each fit, and of what was reported to the pruner."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stagesweep.sweep.report import charts
from stagesweep.sweep.report.loading import Sweep, Trial

# Of a large sweep so many curves are drawn, and so many of the best are named.
LINES, TOP = 200, 5


def fits(sweep: Sweep) -> list[tuple[str, Markup]]:
    """For each stage that trains, one number over its epochs; runs that share it have one line."""
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
        found.append((stage, charts.curves(grey, named, ("epoch", f"{stage}/{metric}"))))
    return found


def reports(sweep: Sweep) -> list[tuple[str, Markup]]:
    """What trials reported while they ran, by step."""
    top = {trial.number for trial in sweep.ranked()[:TOP]} if len(sweep.objectives) == 1 else set()
    drawn = [trial for trial in sweep.trials if trial.reports]
    if not drawn:
        return []
    curve = {t.number: _thinned(sorted(t.reports.items())) for t in drawn[-LINES:]}
    named = {f"#{number}": [line] for number, line in curve.items() if number in top}
    grey = [line for number, line in curve.items() if number not in top]
    return [("reported while training", charts.curves(grey, named, ("step", "reported value")))]


def _fingerprints(trial: Trial, run: Path) -> dict[str, str]:
    """The fingerprint of each stage of a run that is through."""
    stages = trial.results.get(run, {}).get("stages", [])
    return {stage["name"]: stage["fingerprint"] for stage in stages}


def _epochs(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of epochs in a run's metrics, by stage; a half-written line is left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row["kind"] == "epoch":
                found.setdefault(row["stage"], []).append(row)
    return found


def _metric(sweep: Sweep, stage: str, rows: Sequence[dict[str, Any]]) -> str | None:
    """The number of a fit that says most: an objective, else a loss."""
    have = {name for row in rows for name, value in row.items() if value is not None}
    own = [name.partition("/")[2] for name in sweep.objectives if name.startswith(f"{stage}/")]
    wanted = (*own, *(name.rpartition("/")[2] for name in sweep.objectives))
    return next((n for n in (*wanted, "val_loss", "train_loss") if n in have), None)


def _thinned(points: Sequence[tuple[float, float]], most: int = 300) -> charts.Curve:
    """Points with finite values, at most some hundred, as x and y."""
    known = [(x, y) for x, y in points if abs(y) < charts.LARGEST]
    step = max(math.ceil(len(known) / most), 1)
    chosen = known[::step] + ([known[-1]] if known and (len(known) - 1) % step else [])
    return [x for x, _ in chosen], [y for _, y in chosen]
