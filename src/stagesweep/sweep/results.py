"""The results of a sweep, read from its folder: one row a trial, and a table over seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from stagesweep.config import Mode
from stagesweep.metric.interval import mean_interval


def summarise(
    folder: Path, objective: str, parameters: Sequence[str], faults: Mapping[Path, str]
) -> pd.DataFrame:
    """One row for every trial in a sweep's folder, by number.

    Args:
        folder: the sweep; its trials are the folders in it that Hydra composed.
        objective: name of the metric that the sweep steers by, which names its column.
        parameters: keys that differ between trials, a column each.
        faults: reason, by folder, of trials that ended before they could write a result.
    """
    found = [path.parents[1] for path in folder.glob("*/.hydra/overrides.yaml")]
    found.sort(key=lambda trial: (len(trial.name), trial.name))
    first = ["number", "state", "reason", objective, "seconds", "reused", "dir"]
    rows = [_row(trial, objective, parameters, faults) for trial in found]
    return pd.DataFrame(rows, columns=[*first, *parameters])


def _row(
    trial: Path, objective: str, parameters: Sequence[str], faults: Mapping[Path, str]
) -> dict[str, Any]:
    file = trial / "result.json"
    result: dict[str, Any] = {"status": "failed"}
    if file.exists():
        result = json.loads(file.read_text())
    lines = yaml.safe_load((trial / ".hydra" / "overrides.yaml").read_text())
    overrides = OverridesParser.create().parse_overrides(lines)
    values = {o.get_key_element(): o.value() for o in overrides if not o.is_delete()}
    shown = {key: "null" if value is None else value for key, value in values.items()}
    return {
        "number": trial.name,
        "state": result["status"],
        "reason": result.get("reason") or faults.get(trial.absolute()),
        objective: (result.get("objective") or {}).get("value"),
        "seconds": result.get("seconds"),
        "reused": sum(stage["status"] == "reused" for stage in result.get("stages", [])),
        "dir": str(trial),
    } | {key: shown.get(key) for key in parameters}


def ranked(trials: pd.DataFrame, mode: Mode) -> pd.DataFrame:
    """The completed trials, best first."""
    done = trials[trials["state"] == "complete"]
    return done.sort_values(done.columns[3], ascending=mode is Mode.min, kind="stable")


def over_seeds(trials: pd.DataFrame) -> pd.DataFrame | None:
    """What every trial compared, method by method, as mean and 95 % interval over the trials.

    Reads ``comparison.csv`` of each completed trial: columns ``method``, perhaps ``split``, and one
    for each metric. Returns, for each metric, its mean and, in ``<metric>_low`` and
    ``<metric>_high``, Student's t-interval; None when fewer than two trials left such a table.
    """
    done = trials.loc[trials["state"] == "complete", "dir"]
    files = [f for folder in done for f in Path(folder).glob("stages/*/artifacts/comparison.csv")]
    if len(files) < 2:
        return None
    tables = pd.concat([pd.read_csv(file) for file in files])
    keys = [key for key in ("method", "split") if key in tables]
    rows = []
    for names, group in tables.groupby(keys, sort=False):
        row: dict[str, Any] = dict(zip(keys, names, strict=True)) | {"runs": len(group)}
        for metric in group.columns.drop(keys):
            found = mean_interval(group[metric].tolist())
            row |= {metric: found.mean, f"{metric}_low": found.low, f"{metric}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)


def leaderboard(best: pd.DataFrame, parameters: Sequence[str], rows: int = 10) -> str:
    """The first rows of `ranked` trials as aligned text."""
    shown = best[["number", best.columns[3], "seconds", "reused", *parameters]].head(rows)
    return str(shown.to_string(index=False, float_format="{:.4g}".format))


def with_intervals(table: pd.DataFrame) -> str:
    """The table of `over_seeds` as aligned text: ``mean ± half an interval``.

    Only its first split, and only metrics that tell the methods apart.
    """
    if "split" in table:
        table = table[table["split"] == table["split"].iloc[0]]
    metrics = [name for name in table if f"{name}_low" in table and table[name].nunique() > 1]
    shown = table[["method", *(["split"] if "split" in table else [])]].copy()
    for name in metrics:
        half = table[f"{name}_high"] - table[name]
        shown[name] = [f"{m:.3f} ± {h:.3f}" for m, h in zip(table[name], half, strict=True)]
    return str(shown.to_string(index=False))
