"""The output of a sweep on a terminal."""

import io
import logging

import optuna
import pytest
from omegaconf import OmegaConf

from stagesweep.sweep.engine.console import Console
from stagesweep.sweep.engine.job import Job
from stagesweep.sweep.study.states import Outcome
from stagesweep.sweep.study.study import Trial


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Opened:
    """The parts of a study that the console reads."""

    total = 3

    def __init__(self) -> None:
        self.optuna = optuna.create_study(direction="maximize")

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.optuna.get_trials()


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not as a fixture: pytest takes the streams back between setup and call."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdout", screen)
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    monkeypatch.setattr(logging.root, "level", logging.INFO)
    return screen


def test_one_line_for_each_slot_and_one_for_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = at_a_terminal(monkeypatch)
    opened = Opened()
    console = Console(opened, OmegaConf.create({"objective": {"metric": "a/b", "mode": "max"}}))  # type: ignore[arg-type]
    trial, job = Trial(0, ["model.latent=16"]), Job(0, "0", [])
    console.job_started(job, trial)
    console.job_progress(job, "joint 3/5")
    assert "  #0 joint 3/5        model.latent=16" in screen.getvalue()
    opened.optuna.tell(opened.optuna.ask(), 0.25)
    console.job_finished(job)
    console.trial_finished(trial, Outcome("complete", 0.25), 1.5)
    console.close()
    lines = screen.getvalue().replace("\r", "\n").splitlines()
    said = "#0: a/b 0.25 in 1.5 s (best 0.25, #0); 2 to go, about 0 s"
    assert said in [line.strip() for line in lines], "a line of its own, not behind a bar"
    assert any(line.startswith("trials:  33%") and "best 0.25, #0]" in line for line in lines)
