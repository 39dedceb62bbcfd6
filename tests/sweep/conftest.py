"""Sweeps built by hand: a real Optuna study, and the files of its trials. Also a folder for the
real command, with an experiment of one toy stage.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd
import pytest
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

if TYPE_CHECKING:
    from conftest import Process, Warm

BEGIN = datetime(2026, 1, 31, 12)
CHOICES = ("full", "a", "b", "0", "1")
STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}


class Maker:
    """A sweep's folder that grows trial by trial."""

    def __init__(self, folder: Path, directions: Sequence[str], objectives: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.objectives = folder, list(objectives)
        self.end = BEGIN
        self.study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}",
            study_name=folder.name,
            directions=list(directions),
        )

    def trial(
        self,
        params: Mapping[str, Any],
        values: Sequence[float] | None = None,
        state: str = "complete",
        reports: Mapping[int, float] | None = None,
        stages: Sequence[Mapping[str, Any]] = (),
        curves: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
        repeats: Sequence[float | None] = (),
        pause: float = 0,
        constraints: Mapping[str, float] | None = None,
        **attributes: Any,
    ) -> Path:
        """Add a trial of one minute, `pause` seconds after the end of the previous one."""
        number = len(self.study.get_trials(deepcopy=False))
        begun = self.end + timedelta(seconds=pause)
        self.end = begun + timedelta(minutes=1)
        own = {"values": list(repeats)} if repeats else {}
        frozen = optuna.create_trial(
            state=STATES[state],
            values=values,
            params=dict(params),
            distributions={key: self.distribution(value) for key, value in params.items()},
            user_attrs={"dir": str(number), **own, **attributes},
            intermediate_values=dict(reports or {}),
            constraints=dict(constraints) if constraints else None,
        )
        frozen.datetime_start = begun
        if state != "running":
            frozen.datetime_complete = self.end
        self.study.add_trial(frozen)
        folder = self.folder / str(number)
        for run in [folder / str(k) for k in range(len(repeats))] if repeats else [folder]:
            self.run(run, {**params}, state, stages, curves or {})
        return folder

    def run(
        self,
        folder: Path,
        params: Mapping[str, Any],
        state: str,
        stages: Sequence[Mapping[str, Any]],
        curves: Mapping[str, Sequence[Mapping[str, float]]],
    ) -> None:
        """The folder of a run."""
        (folder / ".hydra").mkdir(parents=True)
        metric = self.objectives[0] if len(self.objectives) == 1 else self.objectives
        config = {"experiment": "tiny", "objective": {"metric": metric}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        given = [f"{key}={value}" for key, value in params.items()]
        text = yaml.safe_dump(["experiment=tiny", *given, "~stage.figures"])
        (folder / ".hydra" / "overrides.yaml").write_text(text)
        (folder / "run.log").write_text(f"begun\n{state}, says the log\n")
        if state == "complete":
            result = {"status": "complete", "seconds": 30.0, "stages": list(stages)}
            (folder / "result.json").write_text(json.dumps(result))
        rows = [
            {"stage": stage, "kind": "epoch", "epoch": epoch, "step": epoch, **row}
            for stage, lines in curves.items()
            for epoch, row in enumerate(lines, 1)
        ]
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "metrics.jsonl").write_text(text + '{"stage": "half')

    @staticmethod
    def distribution(value: Any) -> BaseDistribution:
        """Numbers between 1e-6 and 1000 on a logarithmic scale; choices."""
        if isinstance(value, float):
            return FloatDistribution(1e-6, 1000, log=True)
        return CategoricalDistribution([*CHOICES, value] if value not in CHOICES else CHOICES)


Make = Callable[..., Maker]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Start a sweep: `make("name", directions=["minimize"], objectives=["joint/val_loss"])`."""
    monkeypatch.setenv("STAGESWEEP_STORE", str(tmp_path / "store"))
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def begin(
        name: str = "study",
        directions: Sequence[str] = ("maximize",),
        objectives: Sequence[str] = ("evaluate/nmi",),
    ) -> Maker:
        return Maker(tmp_path / name, directions, objectives)

    return begin


EXPERIMENT = """# @package _global_
# A stage with configurable behaviour; its model and data import nothing.
defaults:
  - override /data: toy
  - override /model: toy
  - _self_
stage:
  toy: {_target_: toy.Toy, log: LOG, x: 0.0, y: 0.0, act: well, seconds: 0.0, steps: 0, pause: 0.0}
objective:
  metric: toy/score
"""


class Lab:
    """A folder for sweeps, with an experiment of one toy stage."""

    def __init__(self, folder: Path, warm: "Warm") -> None:
        self.folder, self.log, self.warm = folder, folder / "log", warm
        self.log.mkdir()
        nothing = "_target_: toy.Nothing\n"
        texts = {"experiment": EXPERIMENT.replace("LOG", str(self.log))}
        for group, text in (texts | {"model": nothing, "data": nothing}).items():
            (folder / "conf" / group).mkdir(parents=True)
            (folder / "conf" / group / "toy.yaml").write_text(text)
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            "STAGESWEEP_STORE": str(folder / "store"),
            "STAGESWEEP_TRUST": "toy",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }

    def start(self, *overrides: str) -> "Process":
        own = (f"--config-dir={self.folder / 'conf'}", "-m", "experiment=toy")
        given = (*own, "hydra.sweep.dir=sweep", *overrides)
        return self.warm.start(given, self.folder, self.environment)

    def sweep(self, *overrides: str, status: int = 0) -> tuple[str, str]:
        process = self.start(*overrides)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == status, said + errors
        assert "Traceback" not in errors
        return said, errors

    @property
    def study(self) -> optuna.Study:
        storage = f"sqlite:///{self.folder / 'sweep' / 'study.db'}"
        name = optuna.study.get_all_study_names(storage)[0]
        return optuna.load_study(study_name=name, storage=storage)

    @property
    def table(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "sweep" / "results_summary.csv")

    @property
    def calls(self) -> list[list[str]]:
        """Begin, end, folder and visible GPUs of each call of the stage."""
        return [file.read_text().split() for file in self.log.iterdir() if file.name.isdigit()]

    def processes(self) -> list[int]:
        """Running processes of this sweep: those that work in its folder."""
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [each for each in found if _folder(each).is_relative_to(self.folder)]


def _folder(process: int) -> Path:
    """The working folder of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/cwd").readlink()
    except OSError:
        return Path()


@pytest.fixture
def lab(tmp_path: Path, warm: "Warm") -> Lab:
    return Lab(tmp_path, warm)
