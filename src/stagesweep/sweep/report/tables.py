"""The results of a sweep as tables: its CSV and YAML files, and the text that is printed."""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd
import yaml

from stagesweep.base.files import atomic_text
from stagesweep.metric.interval import Interval, mean_interval
from stagesweep.store.store import Store
from stagesweep.sweep.report.loading import Sweep, Trial
from stagesweep.sweep.study.url import without_password


def write(sweep: Sweep) -> None:
    """Write ``results_summary.csv`` and ``optimization_results.yaml`` into the sweep's folder."""
    atomic_text(sweep.folder / "results_summary.csv", table(sweep).to_csv(index=False))
    text = yaml.safe_dump(best(sweep), sort_keys=False, allow_unicode=True)
    atomic_text(sweep.folder / "optimization_results.yaml", text)


def table(sweep: Sweep) -> pd.DataFrame:
    """One row for each trial: number, state, reason, objectives, seconds, reused, dir, parameters.

    With repeats an objective is followed by ``<objective>_low`` and ``<objective>_high``, its 95 %
    interval. With constraints, ``feasible`` follows the objectives.
    """
    repeated = any(trial.repeats for trial in sweep.trials)
    rows = []
    for trial in sweep.trials:
        row = {"number": trial.number, "state": trial.state, "reason": trial.reason}
        for place, name in enumerate(sweep.objectives):
            row[name] = trial.values[place] if trial.values else None
            if repeated:
                row[f"{name}_low"], row[f"{name}_high"] = interval(trial, place)[1:]
        row["feasible"] = trial.feasible if trial.state == "complete" else None
        row |= {"seconds": trial.seconds, "reused": trial.reused, "dir": str(trial.folder)}
        rows.append(row | {name: trial.params.get(name) for name in sweep.parameters})
    ends = ("", "_low", "_high") if repeated else ("",)
    objectives = [f"{name}{end}" for name in sweep.objectives for end in ends]
    objectives += ["feasible"] if sweep.constrained else []
    first = ["number", "state", "reason", *objectives, "seconds", "reused", "dir"]
    return pd.DataFrame(rows, columns=[*first, *sweep.parameters])


def interval(trial: Trial, objective: int = 0) -> Interval:
    """Mean and 95 % interval of a trial's objective over its repeats."""
    values = [row[objective] for row in trial.repeats if objective < len(row)]
    return mean_interval(values or trial.values[objective : objective + 1])


def best(sweep: Sweep) -> dict[str, Any]:
    """The best trial or the Pareto front, with the keys of Hydra's Optuna sweeper first."""
    found: dict[str, Any] = {"name": "optuna"}
    front = sweep.front
    if len(sweep.objectives) > 1:
        found["solutions"] = [{"params": t.params, "values": t.values} for t in front]
    elif front:
        found |= {"best_params": front[0].params, "best_value": front[0].values[0]}
    numbers = [trial.number for trial in front]
    return found | {
        "best_trials": numbers,
        "objectives": sweep.objectives,
        "states": sweep.states,
        "study": sweep.study.study_name,
        "storage": without_password(sweep.storage),
    }


class Savings(NamedTuple):
    """The reused stages, and the seconds saved. ``unknown`` counts stages without a known time."""

    stages: int
    seconds: float
    unknown: int


def savings(sweep: Sweep) -> Savings:
    """The time saved by reuse: that of training each reused stage, minus that of loading it."""
    took: dict[str, float] = {}
    reused = []
    for stage in (stage for trial in sweep.trials for stage in trial.stages):
        if stage["status"] == "reused":
            reused.append(stage)
        else:
            key = stage["fingerprint"]
            took[key] = max(took.get(key, 0.0), float(stage["seconds"]))
    store = Store.default()
    for key in {stage["fingerprint"] for stage in reused}:
        if (manifest := store.entry(key).manifest) and "seconds" in manifest:
            took[key] = float(manifest["seconds"])
    known = [stage for stage in reused if stage["fingerprint"] in took]
    saved = (took[stage["fingerprint"]] - float(stage["seconds"]) for stage in known)
    return Savings(len(reused), sum(max(each, 0.0) for each in saved), len(reused) - len(known))


# ------------------------------------------------------------------------------ what is printed


def over_seeds(trials: pd.DataFrame) -> pd.DataFrame | None:
    """Mean and 95 % interval over the trials of each method that they compared.

    Reads ``comparison.csv`` of each completed trial: columns ``method``, perhaps ``split``, and one
    for each metric. Returns, for each metric, its mean and, in ``<metric>_low`` and
    ``<metric>_high``, Student's t-interval; and how far two trials agree (see `agreement`), with
    the least and the most of all pairs. None when fewer than two trials left such a table.
    """
    done = trials.loc[trials["state"] == "complete", "dir"]
    files = [f for folder in done for f in Path(folder).glob("stages/*/artifacts/comparison.csv")]
    if len(files) < 2:
        return None
    tables = pd.concat([pd.read_csv(file) for file in files])
    keys = [key for key in ("method", "split") if key in tables]
    pairs = agreement([file.with_name("clusters.csv") for file in files])
    rows = []
    for names, group in tables.groupby(keys, sort=False):
        row: dict[str, Any] = dict(zip(keys, names, strict=True)) | {"runs": len(group)}
        for metric in group.columns.drop(keys):
            found = mean_interval(group[metric].tolist())
            row |= {metric: found.mean, f"{metric}_low": found.low, f"{metric}_high": found.high}
        if aris := pairs.get(names):
            row |= {"agreement": fmean(aris)}
            row |= {"agreement_low": min(aris), "agreement_high": max(aris)}
        rows.append(row)
    return pd.concat(by_split(pd.DataFrame(rows)))


def by_split(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Divide a table by its column ``split``, when it has one."""
    if "split" not in table:
        return [table]
    return [rows for _, rows in table.groupby("split", sort=False)]


def agreement(files: Sequence[Path]) -> dict[tuple[str, ...], list[float]]:
    """Adjusted Rand index of each pair of trials, by method and split.

    Reads ``clusters.csv`` of each: ``id``, ``split``, ``cluster`` of the model and
    ``cluster_<method>`` of each baseline. Empty where a trial left none, or had other samples.
    """
    from stagesweep.metric.clustering import ari

    if not all(file.exists() for file in files):
        return {}
    tables = [pd.read_csv(file) for file in files]
    if not all(table[["id", "split"]].equals(tables[0][["id", "split"]]) for table in tables):
        return {}
    methods = {name: name.removeprefix("cluster_") for name in tables[0] if "cluster_" in name}
    methods = {"cluster": "model", **methods}
    found: dict[tuple[str, ...], list[float]] = {}
    for split in tables[0]["split"].unique():
        rows = tables[0]["split"] == split
        for column, method in methods.items():
            fits = [table.loc[rows, column].to_numpy() for table in tables if column in table]
            found[method, split] = [ari(one, other) for one, other in combinations(fits, 2)]
    return found


def leaderboard(sweep: Sweep, rows: int = 10) -> str:
    """The best trials or the Pareto front as aligned text."""
    front = {trial.number for trial in sweep.front if len(sweep.objectives) > 1}
    best = [trial.number for trial in sweep.ranked() if not front or trial.number in front]
    shown = table(sweep).drop(columns=["state", "reason", "dir"])
    return str(
        shown.set_index("number", drop=False)
        .loc[best[:rows]]
        .to_string(index=False, float_format="{:.4g}".format)
    )


def measured(table: pd.DataFrame) -> list[str]:
    """The metrics of `over_seeds` that differ between methods; with one method, all."""
    found = [name for name in table if f"{name}_low" in table and table[name].notna().any()]
    splits = by_split(table)
    return [
        name for name in found if any(len(rows) == 1 or rows[name].nunique() > 1 for rows in splits)
    ]


def with_intervals(table: pd.DataFrame) -> str:
    """The table of `over_seeds` as aligned text, split by split, with the `measured` metrics.

    A cell is ``mean ± half an interval``, or mean and range for the agreement.
    """
    shown = table[["method", *(["split"] if "split" in table else [])]].copy()
    for name in measured(table):
        columns = [table[name], table[f"{name}_low"], table[f"{name}_high"]]
        form = "{0:.2f} ({1:.2f} to {2:.2f})" if name == "agreement" else "{0:.3f} ± {3:.3f}"
        shown[name] = [
            "" if math.isnan(mean) else form.format(mean, low, high, high - mean)
            for mean, low, high in zip(*columns, strict=True)
        ]
    return str(shown.to_string(index=False))
