"""The results of a sweep: its record read from disk, as tables and as numbers to draw.

The record is the Optuna study in the sweep's folder and what its trials left there. It can be read
at any time: of a sweep that runs, that was killed, or that is finished.
"""

import json
import math
import shlex
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import pandas as pd
import yaml

from stagesweep.errors import UserError
from stagesweep.files import atomic_text
from stagesweep.metric.interval import Interval, mean_interval
from stagesweep.store import Store
from stagesweep.sweep.clock import covered, sessions

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

# What Optuna calls the states of a trial, and what we do. One that waits has not been begun.
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}


@dataclass(frozen=True)
class Trial:
    """One point of a sweep; ``repeats`` has the objectives of each of its runs."""

    number: int
    state: str
    params: dict[str, Any]
    values: list[float]
    repeats: list[list[float]]
    reports: dict[int, float]
    attributes: dict[str, Any]
    begun: datetime | None
    ended: datetime | None
    folder: Path
    # How far each constrained number is above its bound.
    constraints: dict[str, float] = field(default_factory=dict)

    @property
    def feasible(self) -> bool:
        """Whether it keeps all constraints."""
        return all(over <= 0 for over in self.constraints.values())

    @cached_property
    def runs(self) -> list[Path]:
        """The folders of its runs: its own, or one for each repeat."""
        repeats = [path.parent for path in self.folder.glob("[0-9]*/config.yaml")]
        return sorted(repeats, key=lambda path: (len(path.name), path.name)) or [self.folder]

    @cached_property
    def results(self) -> dict[Path, dict[str, Any]]:
        """``result.json`` of each run that has one."""
        found = {run: _plain(run / "result.json") for run in self.runs}
        return {run: result for run, result in found.items() if result}

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """How the stages of all its runs went."""
        return [s for result in self.results.values() for s in result.get("stages", [])]

    @property
    def reused(self) -> int:
        """How many stages came from the store."""
        return sum(stage["status"] == "reused" for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """How long it took."""
        if (known := self.attributes.get("seconds")) is not None:
            return float(known)
        if self.results:
            return sum(float(result.get("seconds") or 0) for result in self.results.values())
        return (self.ended - self.begun).total_seconds() if self.begun and self.ended else None

    @property
    def reason(self) -> str | None:
        """Why it has no value, in a word: error, oom, nan, killed, timeout."""
        if self.state == "failed":
            return str(self.attributes.get("reason", "error"))
        return self.attributes.get("reason")

    @property
    def log(self) -> Path | None:
        """The log of its last run."""
        logs = [run / "run.log" for run in self.runs if (run / "run.log").exists()]
        return logs[-1] if logs else None

    @property
    def message(self) -> str:
        """Why it failed, in a line: what was recorded, or else the last that its log says."""
        if said := self.attributes.get("message"):
            return str(said)
        if reasons := [r["reason"] for r in self.results.values() if r.get("reason")]:
            return str(reasons[-1])
        lines = self.log.read_text(errors="replace").splitlines() if self.log else []
        return next((line for line in reversed(lines) if line.strip()), "")

    @property
    def seen(self) -> datetime | None:
        """When it ended, or else gave its last sign of life."""
        if self.ended:
            return self.ended
        names = ("run.log", "metrics.jsonl", "result.json")
        files = [run / name for run in self.runs for name in names]
        times = [datetime.fromtimestamp(f.stat().st_mtime) for f in files if f.exists()]
        return max(times, default=self.begun)


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
    """Points beside the one they are compared with; ``ablation``: that is the full model."""

    points: list[Point]
    baseline: Point
    ablation: bool


class Saved(NamedTuple):
    """What the store spared a sweep; ``unknown`` stages are those whose time is not known."""

    stages: int
    seconds: float
    unknown: int


@dataclass(frozen=True)
class Sweep:
    """The record of one sweep; ``maximise`` says for each objective which way is better."""

    folder: Path
    study: "Study"
    storage: str
    experiment: str
    command: str
    objectives: list[str]
    maximise: list[bool]
    trials: list[Trial]

    @property
    def parameters(self) -> list[str]:
        """The names of all parameters, in the order of the space."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.params))

    @property
    def complete(self) -> list[Trial]:
        """The trials with a value, by number."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def constrained(self) -> bool:
        """Whether the search had constraints."""
        return any(trial.constraints for trial in self.trials)

    @property
    def states(self) -> dict[str, int]:
        """How many trials are in each state."""
        counted = Counter(trial.state for trial in self.trials)
        return {state: counted[state] for state in STATES.values() if counted[state]}

    @property
    def front(self) -> list[Trial]:
        """The best trial; of several objectives all that none is better than in each."""
        several = len(self.objectives) > 1
        try:
            found = self.study.best_trials if several else [self.study.best_trial]
        except ValueError:  # there is none
            return []
        numbers = {trial.number for trial in found}
        return [trial for trial in self.complete if trial.number in numbers]

    @property
    def seconds(self) -> float:
        """Wall time with at least one trial under way: pauses between do not count."""
        if known := sessions(self.study.user_attrs):
            return covered(known)
        spans = [(trial.begun, trial.seen) for trial in self.trials]
        return covered((b.timestamp(), e.timestamp()) for b, e in spans if b and e)

    def ranked(self, objective: int = 0) -> list[Trial]:
        """The complete trials, best first; those that break a constraint come last."""
        sign = -1.0 if self.maximise[objective] else 1.0
        return sorted(
            self.complete, key=lambda trial: (not trial.feasible, sign * trial.values[objective])
        )


# ------------------------------------------------------------------------------ reading


def read(folder: Path, study: "Study | None" = None) -> Sweep:
    """The record of the sweep in a folder; UserError when there is none.

    Args:
        folder: the sweep's; nothing in it is changed.
        study: the sweep's, when it is open already.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name the folder of a sweep (multirun/<experiment>/…)")
    about = _plain(folder / "sweep.yaml")
    storage = str(about.get("storage") or f"sqlite:///{folder / 'study.db'}")
    if study is None:
        study = _open(folder, None if (folder / "study.db").exists() else about.get("storage"))
    frozen = [t for t in study.get_trials(deepcopy=False) if t.state.name in STATES]
    trials = [_trial(folder, trial) for trial in frozen]
    if trials and not any(trial.folder.is_dir() for trial in trials):
        raise UserError(
            f"the study in {folder} is from elsewhere: none of its {len(trials)} trials has a "
            "folder here; name the folder that the sweep ran in"
        )
    configs = (_plain(run / "config.yaml") for trial in trials for run in trial.runs)
    config: dict[str, Any] = next(filter(None, configs), {})
    begun = about.get("config") or {}
    count = len(study.directions)
    return Sweep(
        folder=folder,
        study=study,
        storage=storage,
        experiment=str(config.get("experiment", "")),
        command=str(about.get("command") or _command(trials)),
        objectives=_objectives(begun.get("objective") or config.get("objective"), count),
        maximise=[direction.name == "MAXIMIZE" for direction in study.directions],
        trials=trials,
    )


def _open(folder: Path, url: str | None) -> "Study":
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    file = folder / "study.db"
    if not url and not file.exists():
        raise UserError(f"no study in {folder}; a sweep's folder holds a study.db")
    place = url or str(file)
    try:
        storage = optuna.storages.RDBStorage(url) if url else _read_only(file)
        names = optuna.study.get_all_study_names(storage)
        if folder.name in names or len(names) == 1:
            name = folder.name if folder.name in names else names[0]
            return optuna.load_study(study_name=name, storage=storage)
    except (SQLAlchemyError, RuntimeError, AssertionError, KeyError, ValueError) as error:
        line = str(error).partition("\n")[0]
        shown = without_password(place)
        raise UserError(f"{shown} cannot be read as an Optuna study: {line}") from error
    have = ", ".join(names) or "none"
    raise UserError(f"{without_password(place)} has no study '{folder.name}'; it has {have}")


def _read_only(file: Path) -> "RDBStorage":
    """A storage that cannot change the file, nor make one."""
    from optuna.storages import RDBStorage

    uri = f"file:{quote(str(file.absolute()))}?mode=ro"
    connect = partial(sqlite3.connect, uri, uri=True, check_same_thread=False)
    return RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})


def _trial(folder: Path, trial: "FrozenTrial") -> Trial:
    attributes = trial.user_attrs
    known = attributes.get("values") or []
    repeats = [value if isinstance(value, list) else [value] for value in known]
    complete = trial.state.name == "COMPLETE"
    return Trial(
        number=trial.number,
        state=STATES[trial.state.name],
        params=dict(trial.params),
        values=[float(value) for value in trial.values or []] if complete else [],
        repeats=[[math.nan if v is None else float(v) for v in row] for row in repeats],
        reports=dict(trial.intermediate_values),
        attributes=attributes,
        begun=trial.datetime_start,
        ended=trial.datetime_complete,
        folder=folder / str(attributes.get("dir", trial.number)),
        constraints=dict(trial.constraints),
    )


def _command(trials: Sequence[Trial]) -> str:
    """The command without what differs between trials, from what the trials were given."""
    given = [
        [str(line) for line in _plain(run / ".hydra" / "overrides.yaml", list)]
        for trial in trials
        for run in trial.runs
        if (run / ".hydra" / "overrides.yaml").exists()
    ]
    own = {name for trial in trials for name in trial.params}
    shared = [
        line
        for line in (given[0] if given else [])
        if line.partition("=")[0].lstrip("+~") not in own and all(line in each for each in given)
    ]
    return shlex.join(["stagesweep", "-m", *shared]) if given else ""


def _objectives(node: Any, count: int) -> list[str]:
    """The names of the objectives that a config gives, as many as the study has."""
    metric = node.get("metric") if isinstance(node, dict) else node
    found = metric if isinstance(metric, list) else [metric]
    names = [each.get("metric") if isinstance(each, dict) else each for each in found]
    if len(names) == count and all(names):
        return [str(name) for name in names]
    return ["objective"] if count == 1 else [f"objective {n}" for n in range(1, count + 1)]


def _plain(path: Path, kind: type = dict) -> Any:
    """The content of a JSON or YAML file; empty when there is none that can be read."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return kind()
    return found if isinstance(found, kind) else kind()


# ------------------------------------------------------------------------------ tables


def write(sweep: Sweep) -> None:
    """Write ``results_summary.csv`` and ``optimization_results.yaml`` into the sweep's folder."""
    atomic_text(sweep.folder / "results_summary.csv", table(sweep).to_csv(index=False))
    text = yaml.safe_dump(best(sweep), sort_keys=False, allow_unicode=True)
    atomic_text(sweep.folder / "optimization_results.yaml", text)


def table(sweep: Sweep) -> pd.DataFrame:
    """One row a trial: number, state, reason, objectives, seconds, reused, dir, parameters.

    With repeats an objective is followed by ``<objective>_low`` and ``<objective>_high``, its 95 %
    interval. With constraints, ``feasible`` after the objectives says who keeps them.
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
    """The best trial or, of several objectives, the Pareto front: the stock plugin's keys first."""
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


def without_password(storage: str) -> str:
    """The URL of a storage, fit to be shown."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(storage).render_as_string(hide_password=True)
    except ArgumentError:
        return storage


def points(sweep: Sweep, objective: int = 0) -> list[Point]:
    """The complete trials by what they try: seeds of one setting are one point."""
    found: dict[str, Point] = {}
    for trial in sweep.complete:
        params = {key: value for key, value in trial.params.items() if key != "seed"}
        name = ", ".join(f"{key}={shown(value)}" for key, value in params.items())
        if list(params) == ["ablation"]:
            name = str(params["ablation"])
        point = found.setdefault(repr(params), Point(name or "all", trial, {}))
        seed = trial.params.get("seed")
        rows = trial.repeats or [trial.values]
        for repeat, row in enumerate(rows):
            point.values.setdefault((seed, repeat), row[objective])
    return list(found.values())


def compare(sweep: Sweep, objective: int = 0) -> Comparison | None:
    """Each point beside the full model of an ablation, or beside the best where there are repeats.

    The full model is what the study's attribute ``baseline`` names among the values of the
    parameter ``ablation``, by default the first of them. None when there is nothing to compare.
    """
    found = points(sweep, objective)
    full = next((p for p in found if _is_full(p.trial, sweep.study)), None)
    if full is None and not any(len(point.values) > 1 for point in found):
        return None
    sign = -1.0 if sweep.maximise[objective] else 1.0
    found.sort(key=lambda point: sign * point.interval.mean)
    found.sort(key=lambda point: not point.trial.feasible)
    if full is not None:
        return Comparison([full, *(p for p in found if p is not full)], full, ablation=True)
    return Comparison(found, found[0], ablation=False)


def _is_full(trial: Trial, study: "Study") -> bool:
    if "ablation" not in trial.params:
        return False
    baseline = study.user_attrs.get("baseline")
    if baseline is None:
        frozen = study.get_trials(deepcopy=False)[trial.number]
        baseline = getattr(frozen.distributions["ablation"], "choices", (None,))[0]
    return bool(trial.params["ablation"] == baseline)


def saved(sweep: Sweep) -> Saved:
    """What reuse spared: for each reused stage the time it once took, less that of loading it."""
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
    spared = (took[stage["fingerprint"]] - float(stage["seconds"]) for stage in known)
    return Saved(len(reused), sum(max(each, 0.0) for each in spared), len(reused) - len(known))


def shown(value: Any) -> str:
    """A value as a person wants to read it: numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------ what is printed


def over_seeds(trials: pd.DataFrame) -> pd.DataFrame | None:
    """What every trial compared, method by method, as mean and 95 % interval over the trials.

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
    return pd.DataFrame(rows)


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
    """The best trials as aligned text; of several objectives the Pareto front, by the first."""
    front = {trial.number for trial in sweep.front if len(sweep.objectives) > 1}
    best = [trial.number for trial in sweep.ranked() if not front or trial.number in front]
    shown = table(sweep).drop(columns=["state", "reason", "dir"])
    return str(
        shown.set_index("number", drop=False)
        .loc[best[:rows]]
        .to_string(index=False, float_format="{:.4g}".format)
    )


def measured(table: pd.DataFrame) -> list[str]:
    """The metrics in the table of `over_seeds` that tell its methods apart; of one method, all."""
    if "split" in table:
        table = table[table["split"] == table["split"].iloc[0]]
    found = [name for name in table if f"{name}_low" in table and table[name].notna().any()]
    return [name for name in found if len(table) == 1 or table[name].nunique() > 1]


def with_intervals(table: pd.DataFrame) -> str:
    """The table of `over_seeds` as aligned text: ``mean ± half an interval``; of the agreement, its
    mean and range.

    Only its first split, and only metrics that tell the methods apart.
    """
    if "split" in table:
        table = table[table["split"] == table["split"].iloc[0]]
    metrics = measured(table)
    shown = table[["method", *(["split"] if "split" in table else [])]].copy()
    for name in metrics:
        columns = [table[name], table[f"{name}_low"], table[f"{name}_high"]]
        form = "{0:.2f} ({1:.2f} to {2:.2f})" if name == "agreement" else "{0:.3f} ± {3:.3f}"
        shown[name] = [form.format(m, low, h, h - m) for m, low, h in zip(*columns, strict=True)]
    return str(shown.to_string(index=False))
