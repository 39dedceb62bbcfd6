"""Other launchers without mocks: joblib, submitit's local executor, a local Ray cluster."""

import importlib
import signal
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Lab

LAUNCHERS = {
    "joblib": "joblib_launcher",
    "submitit_local": "submitit_launcher",
    "ray": "ray_launcher",
}


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> str:
    package = f"hydra_plugins.hydra_{LAUNCHERS[request.param]}"
    if importlib.util.find_spec("hydra_plugins") is None or not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed: make test-extras")
    return str(request.param)


def test_jobs_end_as_on_slots(lab: "Lab", launcher: str) -> None:
    lab.sweep(
        "stage.toy.act=well,raises,no_number",
        "search.repeats=1",
        f"hydra/launcher={launcher}",
        "sweep.slots=2",
    )
    study = lab.study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL"]
    assert [trial.user_attrs.get("reason") for trial in study.trials] == [None, "error", "nan"]
    assert "as it was told" in study.trials[1].user_attrs["message"]


@pytest.mark.parametrize("launcher", ["submitit_local", "ray"], indirect=True)
def test_jobs_run_without_a_barrier_and_are_retried_and_pruned(lab: "Lab", launcher: str) -> None:
    pruner = ("search/pruner=median", "search.pruner.n_startup_trials=1")
    lab.sweep(
        "search=ablation",
        "search/ablation=none",
        "search.ablation.leave_one_out="
        "['stage.toy.seconds=20','stage.toy.act=kill_once','stage.toy.x=-5','stage.toy.y=1']",
        "stage.toy.steps=3",
        "stage.toy.pause=1",
        "search.max_retries=1",
        f"hydra/launcher={launcher}",
        "sweep.slots=2",
        *pruner,
    )
    trials = {trial.params["ablation"]: trial for trial in lab.study.trials}
    long, killed, behind = (trials[name] for name in list(trials)[1:4])
    assert [t.state.name for t in trials.values()].count("COMPLETE") == 4
    assert behind.state.name == "PRUNED"
    assert killed.user_attrs["retries"] == 1
    assert killed.datetime_start < long.datetime_complete  # it began while the long one ran


@pytest.mark.parametrize("launcher", ["submitit_local", "ray"], indirect=True)
def test_a_timeout_ends_a_job_and_an_interrupted_sweep_resumes(lab: "Lab", launcher: str) -> None:
    # They check for a stop after each step; their time starts with a cold start.
    given = ("stage.toy.steps=8,9,500", "stage.toy.pause=0.5", "sweep.slots=2")
    given += ("search.timeout=45", f"hydra/launcher={launcher}")
    process = lab.start(*given)
    until = time.monotonic() + 120
    while not list((lab.folder / "sweep").glob("*/reports.jsonl")):
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "run the same command to resume" in errors.splitlines()[-1]
    assert not [trial for trial in lab.study.trials if trial.state.name == "FAIL"]
    lab.sweep(*given)
    trials = {trial.params["stage.toy.steps"]: trial for trial in lab.study.trials}
    assert [trials[n].state.name for n in (8, 9, 500)] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert trials[500].user_attrs["reason"] == "timeout"
    assert trials[500].user_attrs["message"] == "ran longer than 45 s"
