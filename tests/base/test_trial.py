import pytest

from stagesweep.base import trial


def test_outside_a_sweep_nothing_stops_a_run() -> None:
    trial.current().report("fit", {"val_loss": 1.0}, 1, 3)
    assert not trial.current().should_stop()


def test_the_current_trial_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_current", trial.Trial())
    new = trial.Trial()
    trial.set_current(new)
    assert trial.current() is new
