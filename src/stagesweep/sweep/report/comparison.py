"""Compares the points of a sweep with the full model of an ablation, or with the best."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagesweep.metric.interval import Interval, mean_interval
from stagesweep.sweep.report.loading import Sweep, Trial
from stagesweep.sweep.report.text import format_value

if TYPE_CHECKING:
    from optuna import Study


@dataclass(frozen=True)
class Point:
    """One setting of the parameters, and the values of its runs by seed or repeat."""

    name: str
    trial: Trial
    values: dict[Any, float]

    @property
    def interval(self) -> Interval:
        """Mean and 95 % interval over its runs."""
        return mean_interval(list(self.values.values()))

    def minus(self, other: "Point") -> Interval:
        """The difference from another point, over the runs that both have (paired by seed)."""
        both = [key for key in self.values if key in other.values]
        return mean_interval([self.values[key] - other.values[key] for key in both])


@dataclass(frozen=True)
class Comparison:
    """Points and their baseline, which is the full model when ``ablation`` is true."""

    points: list[Point]
    baseline: Point
    ablation: bool


def points(sweep: Sweep, metric: str) -> list[Point]:
    """Group the complete trials into points. Trials that differ in their seed are one point."""
    found: dict[str, Point] = {}
    for trial in sweep.complete:
        params = {key: value for key, value in trial.params.items() if key != "seed"}
        name = ", ".join(f"{key}={format_value(value)}" for key, value in params.items())
        if list(params) == ["ablation"]:
            name = str(params["ablation"])
        point = found.setdefault(repr(params), Point(name or "all", trial, {}))
        seed = trial.params.get("seed")
        for repeat, value in enumerate(of_runs(sweep, trial, metric)):
            point.values.setdefault((seed, repeat), value)
    return list(found.values())


def of_runs(sweep: Sweep, trial: Trial, metric: str) -> list[float]:
    """A metric of each run of a trial: an objective, or another metric of its result."""
    if metric in sweep.objectives:
        place = sweep.objectives.index(metric)
        return [row[place] for row in trial.repeats or [trial.values]]
    known = (result.get("metrics", {}).get(metric) for result in trial.results.values())
    return [math.nan if value is None else float(value) for value in known]


def compare(sweep: Sweep, objective: int = 0) -> Comparison | None:
    """Compare each point with the full model of an ablation or, with repeats, with the best.

    The full model is what the study's attribute ``baseline`` names among the values of the
    parameter ``ablation``, by default the first of them. None when there is nothing to compare.
    """
    found = points(sweep, sweep.objectives[objective])
    full = next((p for p in found if _is_full(p.trial, sweep.study)), None)
    if full is None and not any(len(point.values) > 1 for point in found):
        return None
    sign = -1.0 if sweep.maximise[objective] else 1.0
    found.sort(key=lambda point: sign * point.interval.mean)
    found.sort(key=lambda point: not point.trial.feasible)
    if full is not None:
        return Comparison([full, *(p for p in found if p is not full)], full, ablation=True)
    return Comparison(found, found[0], ablation=False)


def comparisons(sweep: Sweep) -> dict[str, Comparison]:
    """Comparisons by metric. The further metrics of an ablation keep the order of the first."""
    found = {name: compare(sweep, place) for place, name in enumerate(sweep.objectives)}
    known = {name: each for name, each in found.items() if each is not None}
    first = next(iter(known.values()), None)
    if first is not None and first.ablation:
        for name in sweep.metrics:
            own = {point.trial.number: point for point in points(sweep, name)}
            ordered = [own[point.trial.number] for point in first.points]
            known.setdefault(name, Comparison(ordered, ordered[0], ablation=True))
    return known


def _is_full(trial: Trial, study: "Study") -> bool:
    if "ablation" not in trial.params:
        return False
    baseline = study.user_attrs.get("baseline")
    if baseline is None:
        frozen = study.get_trials(deepcopy=False)[trial.number]
        baseline = getattr(frozen.distributions["ablation"], "choices", (None,))[0]
    return bool(trial.params["ablation"] == baseline)
