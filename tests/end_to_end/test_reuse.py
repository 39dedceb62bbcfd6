"""A run with all stages in the store: equal files, without the imports that training needs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import (  # type: ignore[import-untyped]
    HParamsPluginData,
)

from stagesweep.base.errors import UserError
from stagesweep.config.nodes import hardware_settings
from stagesweep.run import plan

if TYPE_CHECKING:
    from conftest import Warm

Start = Callable[..., "subprocess.CompletedProcess[str]"]

# Digits, a few epochs: every kind of stage in seconds.
QUICK = (
    "experiment=digits",
    "stage.pretrain.epochs=2",
    "stage.joint.epochs=2",
    "stage.choose_clusters.k_range=[9,10]",
    "stage.choose_clusters.resamples=3",
    "stage.baselines.methods=[kmeans]",
    "stage.figures.umap=false",
)
HEAVY = ("torch", "sklearn", "scipy", "pandas", "matplotlib")
# The command, which prints the heavy packages that it has imported.
COMMAND = f"""
import sys
from stagesweep.cli import main
try:
    main()
finally:
    print("imported:", *(name for name in {HEAVY} if name in sys.modules))
"""


def start_cold(cwd: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    """The command in a new interpreter, which says what it has imported."""
    process = subprocess.run(
        [sys.executable, "-c", COMMAND, *overrides],
        cwd=cwd,
        env=os.environ | {"STAGESWEEP_STORE": str(cwd / "store"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture
def start(warm: "Warm") -> Start:
    """The command in a folder that has a store."""

    def run(cwd: Path, *overrides: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
        process = warm.run(overrides, cwd, {"STAGESWEEP_STORE": str(cwd / "store")})
        assert process.returncode == status, process.stderr
        return process

    return run


def imported(process: "subprocess.CompletedProcess[str]") -> set[str]:
    """The heavy packages that the command has imported."""
    return set(process.stdout.splitlines()[-1].split()[1:])


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def statuses(folder: Path) -> dict[str, str]:
    """Stage name -> ran, reused or resumed."""
    return {stage["name"]: stage["status"] for stage in result(folder)["stages"]}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of the stages in the folder of a run, and its metrics."""
    paths = [folder / "metrics.jsonl", *(folder / "stages").rglob("*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


def tensorboard(folder: Path) -> dict[str, Any]:
    """Scalars, and the records of the table of hyperparameters, as TensorBoard reads them."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[str, Any] = {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }
    for tag, content in events.PluginTagToContent("hparams").items():
        found[tag] = HParamsPluginData.FromString(content)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that ran every stage, and the store it filled."""
    folder = tmp_path_factory.mktemp("finished")
    assert imported(start_cold(folder, *QUICK, "hydra.run.dir=run")) == set(HEAVY)
    assert set(statuses(folder / "run").values()) == {"ran"}
    return folder


def test_a_repeated_command_imports_nothing_heavy_and_writes_the_same(finished: Path) -> None:
    process = start_cold(finished, *QUICK, "hydra.run.dir=again")
    assert imported(process) == set()
    run, again = finished / "run", finished / "again"
    assert set(statuses(again).values()) == {"reused"}
    assert contents(again) == contents(run)
    assert result(again)["metrics"] == result(run)["metrics"]
    assert result(again)["objective"] == result(run)["objective"]
    here = {path.name for path in run.iterdir()}
    assert {path.name for path in again.iterdir()} == here


def test_tensorboard_shows_the_same_scalars_and_hyperparameters(
    start: Start, finished: Path
) -> None:
    start(finished, *QUICK, "hydra.run.dir=shown")
    ran, shown = tensorboard(finished / "run"), tensorboard(finished / "shown")
    assert shown == ran
    assert {"evaluate/nmi", "joint/train_loss"} <= shown.keys()
    chosen = shown["_hparams_/session_start_info"].session_start_info.hparams
    assert chosen["stage.joint.epochs"].number_value == 2
    metrics = shown["_hparams_/experiment"].experiment.metric_infos
    assert "evaluate/nmi" in {metric.name.tag for metric in metrics}


def test_a_damaged_entry_runs_again_among_stored_ones(
    start: Start, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "store", tmp_path / "store")
    (damaged,) = (tmp_path / "store").rglob("k_selection.csv")
    damaged.write_text("")
    process = start(tmp_path, *QUICK, "hydra.run.dir=run")
    assert "choose_clusters: runs again, its entry is damaged: " in process.stdout
    found = statuses(tmp_path / "run")
    assert found.pop("choose_clusters") == "ran"
    assert set(found.values()) == {"reused"}
    assert contents(tmp_path / "run") == contents(finished / "run")


@pytest.fixture
def stored(finished: Path, compose: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bool]:
    """Whether the finished run, changed by an override, needs no validation."""
    monkeypatch.setenv("STAGESWEEP_STORE", str(finished / "store"))
    validated: list[Any] = []
    monkeypatch.setattr(plan, "validate_targets", validated.append)

    def stored(override: str) -> bool:
        with suppress(UserError):
            cfg = compose(*QUICK, override)
            plan.plan(cfg, hardware_settings(cfg))
            return not validated
        return False

    return stored


@pytest.mark.parametrize("override", ["seed=0", "hardware.workers=2", "stage.joint.save_every=7"])
def test_overrides_that_change_no_result_need_no_validation(
    stored: Callable[[str], bool], override: str
) -> None:
    assert stored(override)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "resume=never",
        "stage.joint.epochs=3",
        "stage.joint.select=val_lss",
        "objective.metric=evaluate/nmmi",
        "objective.metric=evaluation/nmi",
        "objective.metric=nmi",
        "+hardware.thread=1",
        "hardware.threads=0",
        "hardware.precision=fp16",
        "+model.latnt=3",
        "model._target_=nowhere.Model",
        "init_from=nowhere.pt",
        "~stage.joint",
        "+stage.more={_target_: stagesweep.stage.clustering.figures.Figures}",
    ],
)
def test_anything_else_is_validated_in_full(stored: Callable[[str], bool], override: str) -> None:
    assert not stored(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.metric=evaluate/nmmi", "stage evaluate has no 'nmmi'; did you mean"),
        ("stage.joint.select=val_lss", "stage.joint.select=val_lss is not kept by"),
        ("+model.latnt=3", "model.latnt: ClusteringVAE takes no such argument; did you mean"),
    ],
)
def test_an_error_among_stored_stages_is_reported(
    start: Start, finished: Path, override: str, said: str
) -> None:
    process = start(finished, *QUICK, override, "hydra.run.dir=bad", status=1)
    assert said in process.stderr
    assert not (finished / "bad" / "result.json").exists()


def test_the_reason_of_a_failure_is_its_message(start: Start, tmp_path: Path) -> None:
    fault = ("stage.baselines.methods=[dbscan]", "~stage.pretrain", "~stage.choose_clusters")
    rest = ("~stage.init_clusters", "~stage.joint", "~stage.evaluate", "~stage.figures")
    wanted = "objective.metric=baselines/k"
    process = start(tmp_path, *QUICK, *fault, *rest, wanted, "hydra.run.dir=run", status=1)
    reason = result(tmp_path / "run")["reason"]
    assert f"stagesweep: {reason}" in process.stderr.splitlines()
