"""The running time of a sweep is the union of its sessions."""

import optuna
import pytest

from stagesweep.sweep.study.budget import SweepTimer, recorded_sessions, total_seconds


def test_overlapping_spans_count_once() -> None:
    assert total_seconds([]) == 0
    assert total_seconds([(10, 20), (0, 5), (15, 30), (16, 17)]) == 25


def test_the_timer_records_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    study = optuna.create_study()
    study.set_user_attr("session:elsewhere:1:50", [50.0, 60.0])
    timer = SweepTimer(study)
    timer.tick(last=True)
    assert timer.elapsed == 10, "no trial has run"
    timer.tick()
    now[0] = 103.0
    timer.tick()
    assert sorted(recorded_sessions(study.user_attrs)) == [(50, 60), (100, 100)], "too soon"
    assert timer.elapsed == 13
    timer.tick(last=True)
    assert sorted(recorded_sessions(study.user_attrs)) == [(50, 60), (100, 103)]
    assert SweepTimer(study).elapsed == 13
