"""The record of a sweep, read from disk.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import yaml

from stagesweep.base.errors import UserError
from stagesweep.metric.interval import Interval, mean_interval
from stagesweep.sweep.study.budget import covered, sessions
from stagesweep.sweep.study.url import without_password

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
    """The record of one sweep; ``maximise`` says for each objective which way is better.

    ``metrics`` are what an ablation compares besides.
    """

    folder: Path
    study: "Study"
    storage: str
    experiment: str
    command: str
    objectives: list[str]
    maximise: list[bool]
    trials: list[Trial]
    metrics: list[str] = field(default_factory=list)

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
        metrics=((config.get("search") or {}).get("ablation") or {}).get("metrics") or [],
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
