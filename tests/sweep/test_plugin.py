"""Sweeps by the real command: every method, bad trials, refusals, Ctrl-C."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from stagesweep.base.errors import UserError
from stagesweep.config.schema import objectives
from stagesweep.config.validation import validate
from stagesweep.sweep.engine import setup

if TYPE_CHECKING:
    from conftest import Warm

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Compose = Callable[..., DictConfig]

# Slow stages are left out; pretraining runs once and is then reused.
QUICK = (
    "experiment=tiny",
    "~stage.init_clusters",
    "~stage.joint",
    "~stage.evaluate",
    "objective.metric=pretrain/val_loss",
    "objective.mode=min",
    "stage.pretrain.epochs=1",
    "hydra.sweep.dir=sweep",
)


def summary(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results_summary.csv")


def test_bayesian_search_of_the_experiments_own_space(stagesweep: Command, tmp_path: Path) -> None:
    process = stagesweep(
        "-m",
        "search=bayes",
        "experiment=tiny",
        "search.n_trials=2",
        "search.study=first",
        "stage.pretrain.epochs=1",
        "stage.joint.epochs=1",
        "sweep.slots=1",
    )
    folder = tmp_path / "multirun" / "tiny" / "first"
    table = summary(folder)
    space = ["stage.joint.optimizer.lr", "stage.joint.loss.clustering.weight"]
    columns = ["number", "state", "reason", "evaluate/nmi", "seconds", "reused", "dir"]
    assert list(table.columns) == [*columns, *space]
    assert list(table["state"]) == ["complete"] * 2
    assert table["stage.joint.optimizer.lr"].between(1e-4, 1e-2).all()
    assert set(table["stage.joint.loss.clustering.weight"]) <= {0.1, 0.3}
    assert list(table["reused"]) == [0, 2]  # pretraining and initialisation, once
    study = optuna.load_study(study_name="first", storage=f"sqlite:///{folder / 'study.db'}")
    assert [trial.value for trial in study.trials] == pytest.approx(list(table["evaluate/nmi"]))
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert (folder / "optimization_results.yaml").exists()
    assert "2 of 2 trials finished; the best:" in process.stdout
    assert f"tensorboard --logdir {folder.relative_to(tmp_path)}" in process.stdout
    page = (folder / "report.html").read_text()
    assert "tiny · first" in page
    assert "2 stages taken from the store" in page
    assert f"report      {(folder / 'report.html').relative_to(tmp_path)}" in process.stdout
    best = table.sort_values("evaluate/nmi").iloc[-1]
    assert f"best trial  {best['dir']}" in process.stdout


def test_the_same_command_proposes_the_same_points(stagesweep: Command, tmp_path: Path) -> None:
    lr = "stage.pretrain.optimizer.lr"
    for place in ("one", "two"):
        stagesweep(
            "-m",
            "search=random",
            "search/space=none",
            "search.n_trials=2",
            *QUICK,
            f"hydra.sweep.dir={place}",
            f"{lr}=tag(log, interval(1e-5, 1e-4))",
        )
    one, two = summary(tmp_path / "one"), summary(tmp_path / "two")
    assert list(one[lr]) == list(two[lr])
    assert len(set(one[lr])) == 2
    assert list(two["reused"]) == [1, 1]


def test_seeds_are_compared_with_intervals(stagesweep: Command, tmp_path: Path) -> None:
    process = stagesweep("-m", "experiment=tiny", "seed=0,1", "hydra.sweep.dir=sweep")
    assert "Mean ± half the 95 % interval over 2 seeds:" in process.stdout
    table = pd.read_csv(tmp_path / "sweep" / "comparison.csv")
    model = table[(table["method"] == "model") & (table["split"] == "train")].iloc[0]
    assert model["runs"] == 2
    assert model["nmi_low"] < model["nmi"] < model["nmi_high"]
    assert model["nmi"] == pytest.approx(summary(tmp_path / "sweep")["evaluate/nmi"].mean())


def test_a_bad_trial_is_recorded_and_the_sweep_continues(
    stagesweep: Command, tmp_path: Path
) -> None:
    process = stagesweep("-m", *QUICK, "stage.pretrain.batch_size=0,512,-1")
    table = summary(tmp_path / "sweep").set_index("stage.pretrain.batch_size")
    assert table["state"].to_dict() == {0: "failed", 512: "complete", -1: "failed"}
    assert table["reason"][0] == "error"
    assert "#0: failed error stage.pretrain.batch_size=0: must be at least 1" in process.stdout
    assert "Traceback" not in process.stderr
    assert "1 of 3 trials finished" in process.stdout


def test_a_sweep_without_a_good_trial_fails(stagesweep: Command, tmp_path: Path) -> None:
    process = stagesweep("-m", *QUICK, "stage.pretrain.batch_size=0,-1", status=1)
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("stagesweep: none of 2 trials finished; the first: stage.pretrain.batch")
    assert "Traceback" not in process.stderr
    assert list(summary(tmp_path / "sweep")["state"]) == ["failed", "failed"]


REFUSED = {
    "an unknown objective": (
        ("experiment=tiny", "seed=0,1", "objective.metric=evaluate/nmy"),
        "objective.metric=evaluate/nmy: stage evaluate has no 'nmy'; did you mean 'nmi'?",
    ),
    "an unknown swept key": (
        ("experiment=tiny", "stage.joint.epoch=1,2"),
        "unknown key 'stage.joint.epoch': did you mean 'epochs'?",
    ),
}

# What is fixed, what is swept, and the error.
NO_SEARCH = {
    "a pruner for several objectives": (
        ("objective.metric=[evaluate/nmi,joint/val_loss]", "search/pruner=median"),
        "seed=0,1",
        "a pruner compares trials by one objective, and there are 2 (evaluate/nmi, joint/val_loss)",
    ),
    "a test over repeats of which there are none": (
        ("search/pruner=wilcoxon",),
        "stage.joint.epochs=1,2",
        "search/pruner=wilcoxon compares the repeats of a point, and each point has only one; set ",
    ),
    "nothing to search": (
        ("search=bayes", "search/space=none"),
        "",
        "nothing to search; choose search/space=<name>, or sweep a key: ",
    ),
    "a grid without end": (
        (),
        "stage.joint.optimizer.lr=interval(1e-4, 1e-2)",
        "stage.joint.optimizer.lr=interval(0.0001, 0.01): its values cannot be listed; name them",
    ),
    "a grid that is too large": (
        (),
        "seed=range(0,1601)",
        "this grid has 1,601 points, more than search.max_points=1000; sweep fewer values, or ",
    ),
    "a space that means nothing": (
        ("search=bayes",),
        "seed=1,2,1",
        "seed lists 1 twice; name every value once",
    ),
}

# What trials share is validated as a run is, before the first of them.
INVALID = {
    "one unknown objective of several": (
        ("experiment=tiny", "objective.metric=[evaluate/nmi,joint/val_los]"),
        "objective.metric=joint/val_los: stage joint has no 'val_los'; did you mean 'val_loss'?",
    ),
    "two modes for one objective": (
        ("experiment=tiny", "objective.mode=[max,min]"),
        "objective.mode has 2 entries and objective.metric 1; give each metric a mode, or all of",
    ),
    "a pruner that looks at what no fit gives": (
        ("experiment=tiny", "search/pruner=asha", "search.prune_on=joint/val_los"),
        "search.prune_on=joint/val_los: no fit reports it after each epoch; did you mean 'joint/",
    ),
    "a pruner that looks at no fit": (
        ("experiment=tiny", "search/pruner=asha", "search.prune_on=evaluate/nmi"),
        "search.prune_on=evaluate/nmi: no fit reports it after each epoch; there are pretrain/",
    ),
    "an unknown metric to keep below a bound": (
        ("experiment=tiny", "+search.constraints={evaluate/nmu: 1}"),
        "search.constraints=evaluate/nmu: stage evaluate has no 'nmu'; did you mean 'nmi'?",
    ),
    "a pruner that no fit tells anything": (
        ("experiment=tiny", "search/pruner=median"),
        "search/pruner watches evaluate/nmi, which no fit reports after each epoch; set search.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_every_trial_would_refuse_are_refused_at_once(
    stagesweep: Command, tmp_path: Path, case: str
) -> None:
    arguments, line = REFUSED[case]
    process = stagesweep("-m", *arguments, status=1)
    assert process.stderr.startswith(f"stagesweep: {line}")
    assert len(process.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


def search(cfg: DictConfig, arguments: list[str]) -> None:
    """What the controller makes of the config before it validates the trials."""
    config: Any = SimpleNamespace(hydra=HydraConfig.get())
    settings = setup.search_settings(cfg)
    setup.search_space(config, config.hydra.sweeper, settings, arguments)
    setup.make_pruner(settings, list(objectives(cfg.objective)))


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("case", NO_SEARCH)
def test_settings_that_allow_no_search_are_refused(compose: Compose, case: str) -> None:
    fixed, swept, line = NO_SEARCH[case]
    cfg = compose("experiment=tiny", *fixed)
    with pytest.raises(UserError) as caught:
        search(cfg, [swept] if swept else [])
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("case", INVALID)
def test_shared_settings_are_validated_before_the_first_trial(compose: Compose, case: str) -> None:
    arguments, line = INVALID[case]
    with pytest.raises(UserError) as caught:
        validate(compose(*arguments))
    assert str(caught.value).startswith(line)


def test_a_folder_with_results_is_not_overwritten(stagesweep: Command, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "study.db").write_text("a study")
    process = stagesweep("-m", *QUICK, "seed=0,1", status=1)
    assert process.stderr.startswith("stagesweep: sweep already holds results; ")
    assert (tmp_path / "sweep" / "study.db").read_text() == "a study"


def test_a_pruned_fit_is_partial_and_resumes_when_needed(
    stagesweep: Command, tmp_path: Path
) -> None:
    process = stagesweep(
        "-m",
        "experiment=tiny",
        "stage.joint.epochs=3",
        "stage.joint.optimizer.lr=1e-2,1e-5",
        "search/pruner=median",
        "search.pruner.n_startup_trials=1",
        "search.prune_on=joint/val_loss",
        "search.prune_mode=min",
        "sweep.slots=1",
        "hydra.sweep.dir=sweep",
    )
    assert list(summary(tmp_path / "sweep")["state"]) == ["complete", "pruned"]
    assert "1 of 2 trials finished" in process.stdout
    result = json.loads((tmp_path / "sweep" / "1" / "result.json").read_text())
    assert result["status"] == "pruned"
    assert result["reason"] == "pruned in stage joint, after epoch 1"
    assert [stage["name"] for stage in result["stages"]] == ["pretrain", "init_clusters"]
    left = tmp_path / "sweep" / "1" / "stages" / "3_joint"
    assert list(left.glob("checkpoints/last*.pt"))
    assert not (left / "manifest.json").exists()
    # Run alone, it resumes from its checkpoint.
    stagesweep(
        "experiment=tiny",
        "stage.joint.epochs=3",
        "stage.joint.optimizer.lr=1e-5",
        "hydra.run.dir=alone",
    )
    result = json.loads((tmp_path / "alone" / "result.json").read_text())
    statuses = {stage["name"]: stage["status"] for stage in result["stages"]}
    assert statuses == {
        "pretrain": "reused",
        "init_clusters": "reused",
        "joint": "resumed",
        "evaluate": "ran",
    }


def test_a_stopped_sweep_writes_its_summary(warm: "Warm", tmp_path: Path) -> None:
    """By Ctrl-C; by SIGTERM, see test_controller.py."""
    own = f"--config-dir={Path(__file__).parents[1] / 'conf'}"
    given = ("-m", "seed=range(0,500)", *QUICK, own, "sweep.slots=1")
    process = warm.start(given, tmp_path, {"STAGESWEEP_STORE": str(tmp_path / "store")})
    while not (tmp_path / "sweep" / "1" / "result.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "trials finished; the best:" in said
    assert summary(tmp_path / "sweep")["state"][0] == "complete"
