"""Loads a sweep from disk: its Optuna study, and the files of its trials.

A sweep can be loaded at any time: while it runs, after it was killed, or when it is finished.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stagesweep.base.errors import UserError
from stagesweep.sweep.study.budget import recorded_sessions, total_seconds
from stagesweep.sweep.study.storage import load_recorded

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

# Our names of Optuna's states. A waiting trial has not started, and is left out.
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}

# Charts leave out larger values, and positive ones below the inverse.
LARGEST = 1e100


@dataclass(frozen=True)
class Trial:
    """A trial of a sweep. ``repeats`` has the objectives of each of its runs."""

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
    # The excess of each constrained number over its bound.
    constraints: dict[str, float] = field(default_factory=dict)

    @property
    def feasible(self) -> bool:
        """Whether the trial satisfies all constraints."""
        return all(over <= 0 for over in self.constraints.values())

    @cached_property
    def runs(self) -> list[Path]:
        """The folders of the runs: the trial's own, or one for each repeat."""
        repeats = [path.parent for path in self.folder.glob("[0-9]*/config.yaml")]
        return sorted(repeats, key=lambda path: (len(path.name), path.name)) or [self.folder]

    @cached_property
    def results(self) -> dict[Path, dict[str, Any]]:
        """``result.json`` of each run that has one."""
        found = {run: _read(run / "result.json") for run in self.runs}
        return {run: result for run, result in found.items() if result}

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """The stages of all runs, as in ``result.json``."""
        return [s for result in self.results.values() for s in result.get("stages", [])]

    @property
    def reused(self) -> int:
        """The number of stages reused from the store."""
        return sum(stage["status"] == "reused" for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """The running time; None when it is not known."""
        if (known := self.attributes.get("seconds")) is not None:
            return float(known)
        if self.results:
            return sum(float(result.get("seconds") or 0) for result in self.results.values())
        return (self.ended - self.begun).total_seconds() if self.begun and self.ended else None

    @property
    def reason(self) -> str | None:
        """Why the trial has no value: error, oom, nan, killed or timeout."""
        if self.state == "failed":
            return str(self.attributes.get("reason", "error"))
        return self.attributes.get("reason")

    @property
    def log(self) -> Path | None:
        """The log file of the last run."""
        logs = [run / "run.log" for run in self.runs if (run / "run.log").exists()]
        return logs[-1] if logs else None

    @property
    def message(self) -> str:
        """The error in one line: as recorded, or else the last line of the log."""
        if said := self.attributes.get("message"):
            return str(said)
        if reasons := [r["reason"] for r in self.results.values() if r.get("reason")]:
            return str(reasons[-1])
        lines = self.log.read_text(errors="replace").splitlines() if self.log else []
        return next((line for line in reversed(lines) if line.strip()), "")

    @property
    def last_activity(self) -> datetime | None:
        """When the trial ended, or when a running one last wrote a file."""
        if self.ended:
            return self.ended
        names = ("run.log", "metrics.jsonl", "result.json")
        files = [run / name for run in self.runs for name in names]
        times = [datetime.fromtimestamp(f.stat().st_mtime) for f in files if f.exists()]
        return max(times, default=self.begun)


@dataclass(frozen=True)
class Sweep:
    """A sweep as it is on disk. ``maximise`` has the direction of each objective.

    ``metrics`` are further metrics that an ablation compares.
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
        """The complete trials, by number."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def constrained(self) -> bool:
        """Whether the search had constraints."""
        return any(trial.constraints for trial in self.trials)

    @property
    def states(self) -> dict[str, int]:
        """The number of trials in each state."""
        counted = Counter(trial.state for trial in self.trials)
        return {state: counted[state] for state in STATES.values() if counted[state]}

    @property
    def front(self) -> list[Trial]:
        """The best trial or, of several objectives, the Pareto front."""
        several = len(self.objectives) > 1
        try:
            found = self.study.best_trials if several else [self.study.best_trial]
        except ValueError:  # there is none
            return []
        numbers = {trial.number for trial in found}
        return [trial for trial in self.complete if trial.number in numbers]

    @property
    def seconds(self) -> float:
        """Wall time with at least one running trial, without the pauses between."""
        if known := recorded_sessions(self.study.user_attrs):
            return total_seconds(known)
        spans = [(trial.begun, trial.last_activity) for trial in self.trials]
        return total_seconds((b.timestamp(), e.timestamp()) for b, e in spans if b and e)

    def ranked(self, objective: int = 0) -> list[Trial]:
        """The complete trials, best first. Infeasible ones come last."""
        sign = -1.0 if self.maximise[objective] else 1.0
        return sorted(
            self.complete, key=lambda trial: (not trial.feasible, sign * trial.values[objective])
        )


def drawable(sweep: Sweep, objective: int = 0) -> list[Trial]:
    """The complete trials whose objective is small enough for an axis."""
    return [trial for trial in sweep.complete if abs(trial.values[objective]) < LARGEST]


# ------------------------------------------------------------------------------ reading


def read(folder: Path, study: "Study | None" = None) -> Sweep:
    """Load the sweep in a folder. Raises UserError when there is none.

    Args:
        folder: the folder of the sweep. Nothing in it is changed.
        study: the study, when it is open already.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name the folder of a sweep (multirun/<experiment>/…)")
    about = _read(folder / "sweep.yaml")
    storage = str(about.get("storage") or f"sqlite:///{folder / 'study.db'}")
    if study is None:
        study = load_recorded(folder, about.get("storage"))
    frozen = [t for t in study.get_trials(deepcopy=False) if t.state.name in STATES]
    trials = [_trial(folder, trial) for trial in frozen]
    if trials and not any(trial.folder.is_dir() for trial in trials):
        raise UserError(
            f"the study in {folder} is from elsewhere: none of its {len(trials)} trials has a "
            "folder here; name the folder that the sweep ran in"
        )
    configs = (_read(run / "config.yaml") for trial in trials for run in trial.runs)
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
    """The command of a sweep without a manifest: the overrides that all trials share."""
    given = [
        [str(line) for line in _read(run / ".hydra" / "overrides.yaml", list)]
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
    """The names of the objectives in a config; numbers when they do not fit the study."""
    metric = node.get("metric") if isinstance(node, dict) else node
    found = metric if isinstance(metric, list) else [metric]
    names = [each.get("metric") if isinstance(each, dict) else each for each in found]
    if len(names) == count and all(names):
        return [str(name) for name in names]
    return ["objective"] if count == 1 else [f"objective {n}" for n in range(1, count + 1)]


def _read(path: Path, kind: type = dict) -> Any:
    """The content of a JSON or YAML file; empty when it cannot be read."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return kind()
    return found if isinstance(found, kind) else kind()
