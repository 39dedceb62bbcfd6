"""A sweep is loaded from its folder, and its results are tables."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from scipy import stats

from stagesweep.base.errors import UserError
from stagesweep.sweep.report import charts, tables
from stagesweep.sweep.report.loading import read

Make = Callable[..., Any]


def stage(name: str, status: str, seconds: float, fingerprint: str) -> dict[str, Any]:
    return {"name": name, "status": status, "seconds": seconds, "fingerprint": fingerprint}


@pytest.fixture
def mixed(make: Make) -> Path:
    """One trial of each state."""
    maker = make()
    maker.trial({"lr": 0.1, "part": "a"}, [0.5], seconds=12.5)
    maker.trial({"lr": 0.2, "part": "b"}, [0.25], "pruned", reports={1: 0.25})
    maker.trial({"lr": 0.3, "part": "a"}, None, "failed", reason="oom", message="no memory")
    maker.trial({"lr": 0.4, "part": "a"}, None, "failed")
    maker.trial({"lr": 0.5, "part": "b"}, None, "running")
    maker.trial({"lr": 0.01, "part": "full"}, [0.75])
    maker.study.enqueue_trial({"lr": 1.0})
    return maker.folder


def test_one_row_for_each_trial(mixed: Path) -> None:
    table = tables.table(read(mixed))
    first = ["number", "state", "reason", "evaluate/nmi", "seconds", "reused", "dir"]
    assert list(table.columns) == [*first, "lr", "part"]
    assert list(table["number"]) == list(range(6))
    states = ["complete", "pruned", "failed", "failed", "running", "complete"]
    assert list(table["state"]) == states
    assert list(table["reason"].fillna("")) == ["", "", "oom", "error", "", ""]
    assert list(table["evaluate/nmi"].fillna(-1)) == [0.5, -1, -1, -1, -1, 0.75]
    assert list(table["seconds"][[0, 1, 5]]) == [12.5, 60.0, 30.0]
    assert table["dir"][5] == str(mixed / "5")


def test_the_reason_of_a_failed_trial(mixed: Path) -> None:
    trials = read(mixed).trials
    assert [trials[2].message, trials[3].message] == ["no memory", "failed, says the log"]
    assert trials[3].log == mixed / "3" / "run.log"


def test_totals_of_a_sweep(mixed: Path) -> None:
    sweep = read(mixed)
    assert sweep.experiment == "tiny"
    assert sweep.command == "stagesweep -m experiment=tiny '~stage.figures'"
    assert sweep.states == {"complete": 2, "pruned": 1, "failed": 2, "running": 1}
    assert [trial.number for trial in sweep.ranked()] == [5, 0]
    assert sweep.parameters == ["lr", "part"]


def test_pauses_do_not_count_as_wall_time(make: Make) -> None:
    maker = make()
    for lr, pause in ((0.1, 0), (0.2, 0), (0.3, 600)):
        maker.trial({"lr": lr}, [lr], pause=pause)
    maker.trial({"lr": 0.4}, [0.4], pause=-60)  # beside the one before
    assert read(maker.folder).seconds == 180
    # Where the controllers have said when they ran, that counts: they may have waited for nothing.
    for name, span in (("a", [100.0, 110.0]), ("b", [105.0, 115.0]), ("c", [200.0, 201.0])):
        maker.study.set_user_attr(f"session:{name}", span)
    assert read(maker.folder).seconds == 16


def test_the_best_trial_has_the_keys_of_the_stock_plugin(mixed: Path) -> None:
    tables.write(read(mixed))
    found = yaml.safe_load((mixed / "optimization_results.yaml").read_text())
    assert list(found)[:3] == ["name", "best_params", "best_value"]
    assert found["name"] == "optuna"
    assert found["best_params"] == {"lr": 0.01, "part": "full"}
    assert found["best_value"] == 0.75
    assert found["states"]["failed"] == 2
    assert found["study"] == "study"
    assert optuna.load_study(study_name=found["study"], storage=found["storage"]).best_value == 0.75
    assert len(pd.read_csv(mixed / "results_summary.csv")) == 6


def test_several_objectives_have_solutions(make: Make) -> None:
    names = ["evaluate/nmi", "evaluate/seconds"]
    maker = make(directions=["maximize", "minimize"], objectives=names)
    maker.trial({"lr": 0.1}, [0.5, 10.0])
    maker.trial({"lr": 0.2}, [0.6, 20.0])
    maker.trial({"lr": 0.3}, [0.4, 15.0])
    sweep = read(maker.folder)
    found = tables.best(sweep)
    assert found["solutions"] == [
        {"params": {"lr": 0.1}, "values": [0.5, 10.0]},
        {"params": {"lr": 0.2}, "values": [0.6, 20.0]},
    ]
    assert "best_params" not in found
    assert list(tables.table(sweep).columns[3:5]) == names
    # What is printed are the trials on the front, the best of the first objective first.
    head, *lines = tables.leaderboard(sweep).splitlines()
    assert head.split() == ["number", *names, "seconds", "reused", "lr"]
    assert [line.split()[:3] for line in lines] == [["1", "0.6", "20"], ["0", "0.5", "10"]]


def test_the_leaderboard_is_short_and_aligned(mixed: Path) -> None:
    lines = tables.leaderboard(read(mixed), rows=1).splitlines()
    assert lines[0].split() == ["number", "evaluate/nmi", "seconds", "reused", "lr", "part"]
    assert [line.split() for line in lines[1:]] == [["5", "0.75", "30", "0", "0.01", "full"]]
    assert len({len(line) for line in lines}) == 1


def test_a_trial_that_breaks_a_constraint_is_never_the_best(make: Make) -> None:
    maker = make()
    for lr, value, over in ((0.1, 0.5, -1.0), (0.2, 0.9, 0.5), (0.3, 0.4, 0.0), (0.4, 0.6, 2.0)):
        maker.trial({"lr": lr}, [value], constraints={"seconds": over, "evaluate/leakage": -1.0})
    maker.trial({"lr": 0.5}, None, "failed")
    sweep = read(maker.folder)
    assert [trial.number for trial in sweep.ranked()] == [0, 2, 1, 3]
    assert tables.best(sweep)["best_trials"] == [0]
    table = tables.table(sweep)
    assert list(table.columns[3:6]) == ["evaluate/nmi", "feasible", "seconds"]
    assert list(table["feasible"]) == [True, False, True, False, None]
    assert charts.best_so_far(sweep) == [0.5, 0.5, 0.5, 0.5]
    assert "feasible" not in tables.table(read(make("free").folder))


def test_a_sweep_without_finished_trials_is_not_an_error(make: Make) -> None:
    maker = make()
    assert tables.best(read(maker.folder))["states"] == {}
    assert tables.table(read(maker.folder)).empty
    maker.trial({"lr": 0.1}, None, "failed", reason="nan")
    assert "best_params" not in tables.best(read(maker.folder))


# ------------------------------------------------------------------------------ what is not there


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        read(tmp_path / "nowhere")


def test_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study in"):
        read(tmp_path)
    assert list(tmp_path.iterdir()) == []  # none was made


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0 but cut short"])
def test_a_file_that_is_not_a_study(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.db").write_bytes(content)
    with pytest.raises(UserError, match=r"study\.db") as found:
        read(tmp_path)
    assert "\n" not in str(found.value)
    assert (tmp_path / "study.db").read_bytes() == content


def test_a_study_from_elsewhere(make: Make, tmp_path: Path) -> None:
    maker = make()
    maker.trial({"lr": 0.1}, [0.5])
    other = tmp_path / "other"
    other.mkdir()
    (other / "study.db").write_bytes((maker.folder / "study.db").read_bytes())
    with pytest.raises(UserError, match="from elsewhere"):
        read(other)


def test_a_damaged_result_is_left_out(make: Make) -> None:
    maker = make()
    folder = maker.trial({"lr": 0.1}, [0.5])
    (folder / "result.json").write_text('{"status": ')
    (trial,) = read(maker.folder).trials
    assert trial.stages == []
    assert trial.seconds == 60


def test_a_study_is_only_read(make: Make) -> None:
    maker = make("an #odd name 50%")
    maker.trial({"lr": 0.1}, [0.5])
    before = (maker.folder / "study.db").read_bytes()
    sweep = read(maker.folder)
    assert len(sweep.trials) == 1
    with pytest.raises(optuna.exceptions.StorageInternalError):
        sweep.study.set_user_attr("a", 1)
    assert (maker.folder / "study.db").read_bytes() == before


# ------------------------------------------------------------------------------ repeats


def test_repeats_have_intervals(make: Make) -> None:
    maker = make()
    values = [0.5, 0.75, 0.625]
    maker.trial({"lr": 0.1}, [0.625], repeats=values)
    maker.trial({"lr": 0.2}, [0.5], repeats=[0.5, None, math.nan])
    table = tables.table(read(maker.folder))
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert table["evaluate/nmi_low"][0] == pytest.approx(low)
    assert table["evaluate/nmi_high"][0] == pytest.approx(high)
    assert list(table.columns[3:6]) == ["evaluate/nmi", "evaluate/nmi_low", "evaluate/nmi_high"]
    assert math.isnan(table["evaluate/nmi_low"][1])
    assert [run.name for run in read(maker.folder).trials[0].runs] == ["0", "1", "2"]


# ------------------------------------------------------------------------------ reuse


def test_time_saved_by_reuse(make: Make, tmp_path: Path) -> None:
    a, b, c = (letter * 32 for letter in "abc")
    maker = make()
    maker.trial({"lr": 0.1}, [0.5], stages=[stage("one", "ran", 100, a)])
    reused = [
        stage("one", "reused", 1, a),
        stage("two", "reused", 2, b),
        stage("three", "reused", 1, c),
    ]
    maker.trial({"lr": 0.2}, [0.6], stages=reused)
    sweep = read(maker.folder)
    assert [trial.reused for trial in sweep.trials] == [0, 3]
    assert tables.savings(sweep) == (3, 99, 2)
    # The store knows what other sweeps trained, and how long an interrupted stage took in all.
    entry = tmp_path / "store" / "bb" / b
    entry.mkdir(parents=True)
    (entry / "manifest.json").write_text(json.dumps({"files": {}, "seconds": 52}))
    assert tables.savings(sweep) == (3, 149, 1)
