"""The engine with the real command: failures, resume, kills, pruning, repeats, slots."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd
import pytest
import yaml

if TYPE_CHECKING:
    from conftest import Lab

# The command on a machine with the device file of a driver; its trials find no GPU.
GPUS = """
from stagesweep.hardware import detection
from stagesweep.cli import main
detection.has_gpu_driver = lambda: True
main()
"""


def attributes(study: optuna.Study, name: str) -> dict[int, Any]:
    return {trial.number: trial.user_attrs.get(name) for trial in study.trials}


def test_each_failure_has_its_reason_and_the_sweep_continues(lab: "Lab") -> None:
    acts = ["well", "raises", "no_number", "kill", "kill_once", "hangs"]
    given = (f"stage.toy.act={','.join(acts)}", "search.timeout=15", "search.max_retries=1")
    said, _ = lab.sweep(*given)
    states = ["complete", "failed", "failed", "failed", "complete", "failed"]
    reasons = ["", "error", "nan", "killed", "", "timeout"]
    table = pd.read_csv(lab.folder / "sweep" / "results_summary.csv", keep_default_na=False)
    assert list(table["stage.toy.act"]) == acts
    assert list(table["state"]) == states
    assert list(table["reason"]) == reasons
    assert "2 of 6 trials finished; the best:" in said
    study = lab.study
    # A killed process is retried under its number; one that exceeds its timeout is not.
    assert attributes(study, "retries") == {0: None, 1: None, 2: None, 3: 1, 4: 1, 5: None}
    messages = attributes(study, "message")
    assert "as it was told" in messages[1]
    assert "SIGKILL" in messages[3]
    assert messages[5] == "ran longer than 15 s"
    assert "Traceback" in (lab.folder / "sweep" / "1" / "trial.log").read_text()
    # The limit applies to the whole sweep, over all its starts.
    calls = len(lab.calls)
    _, errors = lab.sweep(*given, "search.max_failure_rate=0.6", status=1)
    assert errors.splitlines()[-1].startswith(
        "stagesweep: 4 of 6 trials failed, more than search.max_failure_rate=0.6 allows; the first"
    )
    assert len(lab.calls) == calls


def test_a_failure_of_the_environment_ends_the_sweep_and_costs_no_trial(lab: "Lab") -> None:
    (lab.log / "full").touch()
    given = ("stage.toy.x=range(0,12)", f"'stage.toy.act=\"{errno.ENOSPC}:full\"'".strip("'"))
    _, errors = lab.sweep(*given, status=1)
    last = errors.splitlines()[-1]
    assert last.startswith("stagesweep: sweep stopped at #"), errors
    assert "disk full" in last
    assert last.endswith("run the same command to resume")
    assert not any(trial.state.is_finished() for trial in lab.study.trials)
    assert len(lab.study.trials) < 12
    (lab.log / "full").unlink()
    said, _ = lab.sweep(*given)
    assert "12 of 12 trials finished" in said
    assert [trial.number for trial in lab.study.trials] == list(range(12))


def test_the_same_error_of_the_first_trials_ends_the_sweep(lab: "Lab") -> None:
    (lab.log / "broken").touch()
    given = ("stage.toy.x=range(0,4)", "stage.toy.act=mendable", "sweep.slots=1")
    _, errors = lab.sweep(*given, "search.max_failures_in_a_row=3", status=1)
    assert "the first 3 trials failed with the same error" in errors
    assert errors.count("the second line") == 1
    assert [trial.state.name for trial in lab.study.trials] == ["FAIL"] * 3
    # Nothing has been fixed: the same command uses no more of the budget.
    lab.sweep(*given, "search.max_failures_in_a_row=3", status=1)
    assert len(lab.study.trials) == 3
    (lab.log / "broken").unlink()
    said, _ = lab.sweep(*given, "search.retry_failed=true")
    assert "4 of 4 trials finished" in said
    assert lab.study.trials[0].user_attrs.keys() == {"overrides", "seconds"}


def test_the_same_command_resumes_and_a_finished_sweep_only_reports(lab: "Lab") -> None:
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
    changed = ("stage.toy.x=0,2", "stage.toy.y=3", "objective.mode=min")
    _, errors = lab.sweep(*changed, "+search.constraints.seconds=99", status=1)
    assert errors.count("\n") == 1
    for part in (
        "space stage.toy.x: was choice(0, 1), is choice(0, 2)",
        "stage.toy.y: was 0.0, is 3",
        "objective.mode: was max, is min",
        "search.constraints.seconds: was absent, is 99",
        "sweep.on_change=continue",
    ):
        assert part in errors
    lab.sweep("stage.toy.x=0,2", "stage.toy.y=3", "sweep.on_change=new")
    assert (lab.folder / "sweep_2" / "1" / "result.json").exists()
    lab.sweep("stage.toy.x=0,1", "stage.toy.y=3", "sweep.on_change=continue")
    _, errors = lab.sweep("stage.toy.x=0,1,2", "sweep.on_change=continue", status=1)
    assert "stage.toy.x: one study cannot hold both" in errors


def test_changed_code_is_refused(lab: "Lab") -> None:
    module = lab.folder / "code" / "toy.py"
    module.parent.mkdir()
    module.write_text((Path(__file__).parents[1] / "toy.py").read_text())
    lab.environment["PYTHONPATH"] = f"{module.parent}{os.pathsep}{lab.environment['PYTHONPATH']}"
    lab.sweep("stage.toy.x=0,1")
    with module.open("a") as file:
        file.write("\n# A comment changes nothing.\n")
    said, _ = lab.sweep("stage.toy.x=0,1")
    assert "2 of 2 trials finished" in said
    with module.open("a") as file:
        file.write("\nMORE = 1\n")
    _, errors = lab.sweep("stage.toy.x=0,1", status=1)
    assert "was started with other settings, code or data: code of toy; put them back" in errors
    said, _ = lab.sweep("stage.toy.x=0,1", "sweep.on_change=continue")
    assert "2 of 2 trials finished" in said
    assert "continuing with changes: code of toy" in said


def test_the_name_of_a_sweep_follows_from_its_command(lab: "Lab") -> None:
    for own in (["search.n_trials=1"], ["search.n_trials=2", "sweep.slots=1"]):
        lab.sweep("stage.toy.x=0,1", *own, "hydra.sweep.dir=multirun/${search.study}")
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


def test_a_small_space_is_exhausted_before_a_point_repeats(lab: "Lab") -> None:
    lab.sweep(
        "search=bayes",
        "search/space=none",
        "stage.toy.x=choice(0,1,2,3)",
        "stage.toy.y=choice(0,1)",
        "search.n_trials=9",
        "sweep.slots=4",
    )
    assert len({str(trial.params) for trial in lab.study.trials[:8]}) == 8
    assert [trial.number for trial in lab.study.trials if "same_as" in trial.user_attrs] == [8]


def test_an_ablation_runs_the_full_model_and_each_variant(lab: "Lab") -> None:
    variant = "+search.ablation.variants.more=['stage.toy.x=2']"
    lab.sweep("search=ablation", "search/ablation=none", variant)
    found = {trial.params["ablation"]: trial.value for trial in lab.study.trials}
    assert found == {"full": 0.0, "more": 2.0}


def test_a_budget_covers_all_starts(lab: "Lab") -> None:
    given = ("stage.toy.x=range(0,5)", "stage.toy.seconds=1", "sweep.slots=1")
    for _ in range(2):
        said, _ = lab.sweep(*given, "search.budget=0.5")
        assert re.search(r"search.budget=0.5 s is spent \(\d+ s\): no more trials start", said)
        assert "1 of 1 trials finished" in said
        assert len(lab.study.trials) == 1


def test_points_above_a_bound_are_never_the_best(lab: "Lab") -> None:
    said, _ = lab.sweep(
        "search=bayes",
        "search/space=none",
        "search.n_trials=4",
        "hydra.sweeper.sampler.n_startup_trials=2",
        "stage.toy.x=interval(0.0,2.0)",
        "stage.toy.y=interval(0.0,2.0)",
        "search.enqueue=[{stage.toy.x: 2.0, stage.toy.y: 2.0},{stage.toy.x: 1.9, stage.toy.y: 1}]",
        "+search.constraints={toy/cost: 1.0, seconds: 1000}",
    )
    table = lab.table
    assert list(table.columns[3:6]) == ["toy/score", "feasible", "seconds"]
    assert list(table["feasible"]) == list(table["stage.toy.y"] <= 1)
    # Enqueued points come first.
    points = [tuple(trial.params.values()) for trial in lab.study.trials]
    assert points[:2] == [(2.0, 2.0), (1.9, 1.0)]
    first = lab.study.trials[0].constraints
    assert first["toy/cost"] == 1.0
    assert -1000 < first["seconds"] < 0
    best = table[table["feasible"]].sort_values("toy/score").iloc[-1]
    assert best["toy/score"] < 2.0
    assert f"best trial  {best['dir']}" in said
    assert "#0: toy/score 2 in" in said
    assert "infeasible" in (lab.folder / "sweep" / "report.html").read_text()


def test_a_key_is_proposed_only_where_it_exists(lab: "Lab") -> None:
    said, errors = lab.sweep(
        "search=bayes",
        "search/space=none",
        "search.n_trials=6",
        "hydra.sweeper.sampler.n_startup_trials=2",
        "stage.toy.act=choice(well,fine)",
        "stage.toy.x=interval(1.0,2.0)",
        "+search.when={stage.toy.x: 'stage.toy.act=well'}",
        "search.enqueue=[{stage.toy.act: well},{stage.toy.act: fine}]",
    )
    assert not re.search("warn|independent", said + errors, re.IGNORECASE)
    there = lab.table["stage.toy.act"] == "well"
    assert {True, False} == set(there)
    assert list(lab.table["stage.toy.x"].notna()) == list(there)
    assert list(lab.table["toy/score"] > 0) == list(there)


def test_bad_trials_are_pruned(lab: "Lab") -> None:
    pruner = ("search/pruner=median", "search.pruner.n_startup_trials=1", "sweep.slots=1")
    lab.sweep("stage.toy.x=5,1,6", "stage.toy.steps=4", *pruner)
    study = lab.study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert study.trials[1].intermediate_values == {1: 1.0}
    assert study.trials[0].intermediate_values == {1: 5.0, 2: 10.0, 3: 15.0, 4: 20.0}


def test_a_variant_can_remove_a_key_that_the_command_line_sets(lab: "Lab") -> None:
    lab.sweep(
        "search=ablation",
        "search/ablation=none",
        "search.ablation.leave_one_out=['~stage.toy.x']",
        "search.ablation.metrics=[toy/cost]",
        "stage.toy.x=5",
        "stage.toy.y=7",
    )
    assert list(lab.table["toy/score"]) == [5, 0], "the second has its default again"
    page = (lab.folder / "sweep" / "report.html").read_text()
    assert page.count("Each variant beside the full model") == 2


@pytest.mark.parametrize("method", ["nsga2", "bayes"])
def test_several_objectives_have_a_front(lab: "Lab", method: str) -> None:
    points = [{"stage.toy.x": x, "stage.toy.y": y} for x, y in ((1.0, 1.0), (2.0, 2.0), (0.0, 3.0))]
    said, _ = lab.sweep(
        f"search={method}",
        "search/space=none",
        "search.n_trials=4",
        "stage.toy.x=interval(0.0,2.0)",
        "stage.toy.y=interval(1.0,3.0)",
        "objective.metric=[toy/score,toy/cost]",
        "objective.mode=[max,min]",
        f"search.enqueue={points}".replace("'", ""),
    )
    table = lab.table
    assert list(table.columns[3:5]) == ["toy/score", "toy/cost"]
    assert list(table["toy/cost"]) == list(table["stage.toy.y"])
    found = yaml.safe_load((lab.folder / "sweep" / "optimization_results.yaml").read_text())
    front = {tuple(each["values"]) for each in found["solutions"]}
    assert {(1.0, 1.0), (2.0, 2.0)} <= front
    assert (0.0, 3.0) not in front
    assert "4 of 4 trials finished; the Pareto front:" in said
    assert "toy/score 2, toy/cost 2 in" in said
    assert f"({len(front)} on the Pareto front); 0 to go" in said
    assert "Pareto front" in (lab.folder / "sweep" / "report.html").read_text()
    result = json.loads((lab.folder / "sweep" / "0" / "result.json").read_text())
    assert [each["name"] for each in result["objective"]] == ["toy/score", "toy/cost"]


def test_the_wilcoxon_pruner_skips_remaining_repeats(lab: "Lab") -> None:
    said, _ = lab.sweep(
        "stage.toy.x=3,3,1",
        "stage.toy.y=0,1,2",
        "search.zip=[[stage.toy.x,stage.toy.y]]",
        "search.repeats=8",
        "search/pruner=wilcoxon",
        "sweep.slots=2",
    )
    trials = lab.study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2 + ["PRUNED"]
    # Seed by seed, whatever order they ended in.
    assert trials[0].intermediate_values == {seed: 3.0 + seed for seed in range(8)}
    assert trials[0].value == 6.5
    # Four runs that are all worse than the best give p = 1/16.
    assert trials[2].intermediate_values == {seed: 1.0 + seed for seed in range(4)}
    assert len(lab.calls) == 8 + 8 + 4
    assert "2 of 3 trials finished" in said
    # With two slots the first two points ran side by side, each of them seed by seed.
    assert {Path(call[2]).parent.name for call in sorted(lab.calls)[:4]} == {"0", "1"}


def test_the_first_repeat_decides_about_pruning(lab: "Lab") -> None:
    pruner = ("search/pruner=median", "search.pruner.n_startup_trials=1", "sweep.slots=1")
    lab.sweep("stage.toy.x=5,1", "stage.toy.steps=2", "search.repeats=2", *pruner)
    trials = lab.study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED"]
    assert trials[0].intermediate_values == {1: 5.0, 2: 10.0}
    assert not (lab.folder / "sweep" / "1" / "1").exists()


def test_slots_run_side_by_side_on_gpus_of_their_own(lab: "Lab") -> None:
    given = ("stage.toy.x=0,1", "stage.toy.seconds=3", "hardware.device=auto")
    own = (f"--config-dir={lab.folder / 'conf'}", "-m", "experiment=toy", "hydra.sweep.dir=sweep")
    environment = os.environ | lab.environment | {"CUDA_VISIBLE_DEVICES": "3,5"}
    command = [sys.executable, "-c", GPUS, *own, *given]
    subprocess.run(command, cwd=lab.folder, env=environment, check=True, timeout=300)
    (first, second) = sorted(lab.calls)
    assert float(second[0]) < float(first[1])
    assert {first[3], second[3]} == {"3", "5"}


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_sweep_killed_at_any_moment_runs_every_point_once(lab: "Lab") -> None:
    chance = random.Random(0)
    given = ("stage.toy.x=range(0,8)", "stage.toy.seconds=0.5", "search.max_retries=9")
    for victim in ("controller", "trial", "controller"):
        process = lab.start(*given)
        calls = len(lab.calls)
        wait_until(lambda: len(lab.calls) > calls or process.poll() is not None)  # noqa: B023
        time.sleep(chance.random())
        others = set(lab.processes()) - {process.pid} if victim == "trial" else set()
        with suppress(ProcessLookupError):  # it may have ended meanwhile
            os.kill(chance.choice(sorted(others) or [process.pid]), signal.SIGKILL)
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
    given = ("stage.toy.x=0,1", "stage.toy.seconds=60")
    process = lab.start(*given)
    wait_until((lab.folder / "sweep" / "sweep.yaml").exists)
    _, errors = lab.sweep(*given, status=1)
    assert errors.startswith("stagesweep: another process is running the sweep in sweep; ")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)


def test_a_stopped_sweep_continues_its_trials_at_the_next_start(lab: "Lab") -> None:
    given = ("stage.toy.x=0,1,2", "stage.toy.seconds=2")
    process = lab.start(*given)
    wait_until((lab.folder / "sweep" / "0" / "config.yaml").exists)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert errors.endswith("run the same command to resume\n")
    assert list(lab.table["number"])[:1] == [0], "the summary is written"
    assert any(trial.state.name == "RUNNING" for trial in lab.study.trials)
    wait_until(lambda: not lab.processes())
    lab.sweep(*given)
    assert [trial.state.name for trial in lab.study.trials] == ["COMPLETE"] * 3


def test_hydras_own_launcher_runs_them_one_by_one(lab: "Lab") -> None:
    lab.sweep("stage.toy.act=well,raises", "hydra/launcher=basic", "search.repeats=2")
    assert [trial.state.name for trial in lab.study.trials] == ["COMPLETE", "FAIL"]
    # Repeats are runs under several seeds, and the value is their mean.
    assert attributes(lab.study, "values")[0] == [0.0, 1.0]
    assert lab.study.trials[0].value == 0.5
    assert (lab.folder / "sweep" / "0" / "1" / "result.json").exists()
    assert "as it was told" in attributes(lab.study, "message")[1]


# ------------------------------------------------------------ failures of the surroundings

THREE = ("stage.toy.x=1,2,3", "stage.toy.seconds=0.3", "sweep.slots=1")


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave no room on a disk."""
    with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    try:
        yield
    finally:
        (disk / "ballast").unlink()


def goes_on(lab: "Lab") -> bool:
    """The same command runs what is left, and each trial ends once."""
    lab.sweep(*THREE)
    return [(t.state.name, t.value) for t in lab.study.trials] == [
        ("COMPLETE", 1.0),
        ("COMPLETE", 2.0),
        ("COMPLETE", 3.0),
    ]


def test_a_full_store(lab: "Lab", small_disk: Path) -> None:
    lab.environment["STAGESWEEP_STORE"] = str(small_disk / "store")
    with full(small_disk):
        _, errors = lab.sweep(*THREE, status=1)
    (line,) = errors.splitlines()
    assert line.startswith("stagesweep: sweep stopped at #0: disk full: cannot write ")
    assert line.endswith("when that works again, run the same command to resume")
    assert [trial.state.name for trial in lab.study.trials] == ["RUNNING"]
    assert goes_on(lab)


@pytest.mark.parametrize("cause", ["full", "removed"])
def test_a_study_that_cannot_be_written(lab: "Lab", small_disk: Path, cause: str) -> None:
    (lab.folder / "sweep").symlink_to(small_disk)
    process = lab.start(*THREE)
    while not list(lab.log.iterdir()):  # until the first trial has ended
        assert process.poll() is None, process.output()
        time.sleep(0.01)
    if cause == "full":
        with full(small_disk):
            process.wait(120)
    else:
        (small_disk / "study.db").unlink()
        process.wait(120)
    (line,) = process.output()[1].splitlines()
    assert process.returncode == 1
    assert line.startswith("stagesweep: ")
    assert "run the same command" in line
    assert goes_on(lab)
