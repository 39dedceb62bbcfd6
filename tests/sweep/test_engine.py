"""The engine by the real command: ends of every kind, resume, kills, pruning, repeats, slots."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

if TYPE_CHECKING:
    from conftest import Lab

# The command on a machine whose driver has left a device file; its trials find no GPU.
GPUS = """
from stagesweep.hardware import gpu
from stagesweep.cli import main
gpu.may_be_there = lambda: True
main()
"""


def attributes(study: optuna.Study, name: str) -> dict[int, Any]:
    return {trial.number: trial.user_attrs.get(name) for trial in study.trials}


def test_each_bad_end_has_its_reason_and_the_sweep_goes_on(lab: "Lab") -> None:
    said, _ = lab.sweep("stage.toy.act=well,raises,no_number,kill", "search.max_retries=0")
    study = lab.study
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "FAIL", "FAIL"]
    reasons = [None, "error", "nan", "killed"]
    assert list(attributes(study, "reason").values()) == reasons
    messages = attributes(study, "message")
    assert "as it was told" in messages[1]
    assert "SIGKILL" in messages[3]
    assert "Traceback" in (lab.folder / "sweep" / "1" / "trial.log").read_text()
    assert "1 of 4 trials finished" in said


def test_a_run_past_its_timeout_is_ended_and_not_tried_again(lab: "Lab") -> None:
    lab.sweep("stage.toy.seconds=0,500", "search.timeout=15", "search.max_retries=3")
    study = lab.study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"]
    assert attributes(study, "reason")[1] == "timeout"
    assert attributes(study, "retries")[1] is None


def test_a_killed_trial_is_tried_again_under_its_number(lab: "Lab") -> None:
    lab.sweep("stage.toy.act=kill_once", "search.max_retries=1")
    study = lab.study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]
    assert attributes(study, "retries") == {0: 1}


def test_too_many_failures_end_with_status_1(lab: "Lab") -> None:
    _, errors = lab.sweep("stage.toy.act=well,raises", "search.max_failure_rate=0.4", status=1)
    assert errors.splitlines()[-1].startswith(
        "stagesweep: 1 of 2 trials failed, more than search.max_failure_rate=0.4 allows; the first"
    )


def test_the_same_command_goes_on_and_a_finished_sweep_only_says_so(lab: "Lab") -> None:
    space = "stage.toy.x=interval(0.0,1.0)"
    given = ("search=random", "search/space=none", space)
    lab.sweep(*given, "search.n_trials=3")
    first = [trial.params for trial in lab.study.trials]
    said, _ = lab.sweep(*given, "search.n_trials=3")
    assert "3 of 3 trials finished" in said
    assert len(lab.calls) == 3
    lab.sweep(*given, "search.n_trials=5")
    found = [trial.params for trial in lab.study.trials]
    assert found[:3] == first
    assert len({str(point) for point in found}) == 5
    assert len(lab.calls) == 5


def test_a_changed_sweep_is_refused_with_the_differences(lab: "Lab") -> None:
    lab.sweep("stage.toy.x=0,1")
    _, errors = lab.sweep("stage.toy.x=0,2", "stage.toy.y=3", "objective.mode=min", status=1)
    assert errors.count("\n") == 1
    for part in (
        "space stage.toy.x: was choice(0, 1), is choice(0, 2)",
        "stage.toy.y: was 0.0, is 3",
        "objective.mode: was max, is min",
        "sweep.on_change=continue",
    ):
        assert part in errors
    lab.sweep("stage.toy.x=0,2", "stage.toy.y=3", "sweep.on_change=new")
    assert (lab.folder / "sweep_2" / "1" / "result.json").exists()
    lab.sweep("stage.toy.x=0,1", "stage.toy.y=3", "sweep.on_change=continue")
    _, errors = lab.sweep("stage.toy.x=0,1,2", "sweep.on_change=continue", status=1)
    assert "stage.toy.x: one study cannot hold both" in errors


def test_the_name_of_a_sweep_follows_from_its_command(lab: "Lab") -> None:
    for limit in ("search.n_trials=1", "search.n_trials=2", "sweep.slots=1"):
        lab.sweep("stage.toy.x=0,1", limit, "hydra.sweep.dir=multirun/${search.study}")
    (folder,) = (lab.folder / "multirun").iterdir()
    assert folder.name.startswith("grid_")
    assert (folder / "1" / "result.json").exists()


def test_the_same_point_is_run_once(lab: "Lab") -> None:
    choices = "stage.toy.x=choice(0,1)"
    lab.sweep("search=random", "search/space=none", choices, "search.n_trials=6")
    study = lab.study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6
    assert [trial.value for trial in study.trials] == [
        trial.params["stage.toy.x"] for trial in study.trials
    ]
    assert len(lab.calls) == 2
    assert sum(value is not None for value in attributes(study, "same_as").values()) == 4


def test_named_points_come_first(lab: "Lab") -> None:
    lab.sweep(
        "search=bayes",
        "search/space=none",
        "stage.toy.x=interval(0.0,1.0)",
        "search.enqueue=[{stage.toy.x: 0.25},{stage.toy.x: 0.75}]",
        "search.n_trials=3",
    )
    assert [trial.params["stage.toy.x"] for trial in lab.study.trials][:2] == [0.25, 0.75]


def test_an_ablation_runs_the_full_model_and_each_variant(lab: "Lab") -> None:
    variant = "+search.ablation.variants.more=['stage.toy.x=2']"
    lab.sweep("search=ablation", "search/ablation=none", variant)
    found = {trial.params["ablation"]: trial.value for trial in lab.study.trials}
    assert found == {"full": 0.0, "more": 2.0}


def test_repeats_are_runs_under_several_seeds(lab: "Lab") -> None:
    lab.sweep("stage.toy.x=0,10", "search.repeats=3")
    study = lab.study
    assert [trial.value for trial in study.trials] == [1.0, 11.0]
    assert sorted(attributes(study, "values")[1]) == [10.0, 11.0, 12.0]
    assert (lab.folder / "sweep" / "1" / "2" / "result.json").exists()


def test_a_budget_begins_no_more_trials(lab: "Lab") -> None:
    lab.sweep(
        "stage.toy.x=range(0,50)", "stage.toy.seconds=0.2", "search.budget=0.1", "sweep.slots=1"
    )
    assert len(lab.study.trials) < 50


def test_trials_that_fall_behind_are_pruned(lab: "Lab") -> None:
    pruner = ("search/pruner=median", "search.pruner.n_startup_trials=1", "sweep.slots=1")
    lab.sweep("stage.toy.x=5,1,6", "stage.toy.steps=4", *pruner)
    study = lab.study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert study.trials[1].intermediate_values == {1: 1.0}
    assert study.trials[0].intermediate_values == {1: 5.0, 2: 10.0, 3: 15.0, 4: 20.0}


def test_slots_run_side_by_side_on_gpus_of_their_own(lab: "Lab") -> None:
    lab.environment["CUDA_VISIBLE_DEVICES"] = "3,5"
    lab.command = (sys.executable, "-c", GPUS)
    lab.sweep("stage.toy.x=0,1", "stage.toy.seconds=3", "hardware.device=auto")
    (first, second) = sorted(lab.calls)
    assert float(second[0]) < float(first[1])
    assert {first[2], second[2]} == {"3", "5"}


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_killed_anywhere_it_ends_with_every_point_once(lab: "Lab") -> None:
    chance = random.Random(0)
    given = ("stage.toy.x=range(0,8)", "stage.toy.seconds=0.5", "search.max_retries=9")
    for victim in ("controller", "trial", "controller"):
        process = lab.start(*given)
        calls = len(lab.calls)
        wait_until(lambda: len(lab.calls) > calls or process.poll() is not None)  # noqa: B023
        time.sleep(chance.random())
        own = [int(Path(p).name) for p in lab.processes()]
        others = [pid for pid in own if pid != process.pid]
        os.kill(process.pid if victim == "controller" else chance.choice(others), signal.SIGKILL)
        if victim == "trial":
            time.sleep(1)
            process.kill()
        process.communicate()
    lab.sweep(*given)
    study = lab.study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 8
    assert sorted(trial.params["stage.toy.x"] for trial in study.trials) == list(range(8))
    wait_until(lambda: not lab.processes())


def test_two_controllers_do_not_share_a_sweep(lab: "Lab") -> None:
    given = ("stage.toy.x=0,1", "stage.toy.seconds=3")
    process = lab.start(*given)
    wait_until((lab.folder / "sweep" / "sweep.yaml").exists)
    _, errors = lab.sweep(*given, status=1)
    assert errors.startswith("stagesweep: another process is running the sweep in sweep; ")
    process.communicate(timeout=120)


def test_told_to_stop_it_leaves_what_is_under_way_to_the_next_start(lab: "Lab") -> None:
    given = ("stage.toy.x=0,1,2", "stage.toy.seconds=2")
    process = lab.start(*given)
    wait_until((lab.folder / "sweep" / "0" / "config.yaml").exists)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert errors.endswith("the same command goes on with what is left\n")
    assert any(trial.state.name == "RUNNING" for trial in lab.study.trials)
    wait_until(lambda: not lab.processes())
    lab.sweep(*given)
    assert [trial.state.name for trial in lab.study.trials] == ["COMPLETE"] * 3


def test_hydras_own_launcher_runs_them_one_by_one(lab: "Lab") -> None:
    lab.sweep("stage.toy.act=well,raises", "hydra/launcher=basic", "search.repeats=2")
    assert [trial.state.name for trial in lab.study.trials] == ["COMPLETE", "FAIL"]
    assert "as it was told" in attributes(lab.study, "message")[1]
