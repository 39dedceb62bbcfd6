"""Finished stages are neither lost nor repeated: the real command, killed and started again."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Process, Warm

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "Process"]

# Digits, a few epochs: the whole chain of stages in seconds.
QUICK = (
    "experiment=digits",
    "stage.pretrain.epochs=2",
    "stage.joint.epochs=12",
    "stage.joint.save_every=3",
    "stage.joint.save_seconds=0",
    "stage.joint.save_seconds=0",
    "stage.choose_clusters.k_range=[9,10]",
    "stage.choose_clusters.resamples=3",
    "~stage.baselines",
    "~stage.figures",
)


def result(folder: Path) -> dict[str, Any]:
    """result.json of the run in `folder`."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def statuses(folder: Path) -> dict[str, str]:
    """Stage name -> ran, reused or resumed."""
    return {stage["name"]: stage["status"] for stage in result(folder)["stages"]}


def files(folder: Path) -> set[str]:
    """Relative paths of all files of the stages of a run."""
    stages = folder / "stages"
    return {str(path.relative_to(stages)) for path in stages.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def start(warm: "Warm") -> Start:
    """Start the command in a folder, with a store of its own: `start(folder, store, "seed=1")`."""

    def run(cwd: Path, store: Path, *overrides: str) -> "Process":
        return warm.start(overrides, cwd, {"STAGESWEEP_STORE": str(store)})

    return run


def joint_rows(store: Path) -> int:
    """Rows that the joint stage has written so far."""
    found = [path.read_text() for path in store.rglob("metrics.jsonl")]
    return sum(text.count('"stage": "joint"') for text in found)


def wait_for_rows(process: "Process", store: Path, rows: int) -> None:
    """Wait until the joint stage has that many rows, or the process has ended."""
    while process.poll() is None and joint_rows(store) < rows:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run and its store: <folder>/run, <folder>/store."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, folder / "store", *QUICK, "hydra.run.dir=run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


def test_a_repeated_command_reuses_every_stage_and_writes_the_same_files(
    start: Start, undisturbed: Path
) -> None:
    process = start(undisturbed, undisturbed / "store", *QUICK, "hydra.run.dir=again")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    again = undisturbed / "again"
    assert set(statuses(undisturbed / "run").values()) == {"ran"}
    assert set(statuses(again).values()) == {"reused"}
    assert files(again) == files(undisturbed / "run")
    assert result(again)["metrics"] == result(undisturbed / "run")["metrics"]
    rows = (again / "metrics.jsonl").read_text()
    assert rows == (undisturbed / "run" / "metrics.jsonl").read_text()
    assert list((again / "tensorboard").glob("events*"))


def test_a_change_of_the_joint_stage_reuses_earlier_stages(start: Start, undisturbed: Path) -> None:
    overrides = (*QUICK, "stage.joint.optimizer.lr=2e-4", "hydra.run.dir=changed")
    process = start(undisturbed, undisturbed / "store", *overrides)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = statuses(undisturbed / "changed")
    before, after = list(found.values())[:3], list(found.values())[3:]
    assert list(found)[:4] == ["pretrain", "choose_clusters", "init_clusters", "joint"]
    assert set(before) == {"reused"}
    assert set(after) == {"ran"}


def test_resume_never_retrains_to_the_same_numbers(start: Start, undisturbed: Path) -> None:
    overrides = (*QUICK, "resume=never", "hydra.run.dir=never")
    store = undisturbed / "store_never"
    for _ in range(2):
        process = start(undisturbed, store, *overrides)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert set(statuses(undisturbed / "never").values()) == {"ran"}
    expected = result(undisturbed / "run")["metrics"]
    assert result(undisturbed / "never")["metrics"] == expected


@pytest.mark.parametrize("attempt", range(2))
def test_a_run_killed_in_the_joint_stage_ends_with_the_same_bits(
    start: Start, undisturbed: Path, tmp_path: Path, attempt: int
) -> None:
    store = tmp_path / "store"
    moments = random.Random(attempt).sample(range(1, 12), 2)
    for rows in sorted(moments):
        process = start(tmp_path, store, *QUICK, "hydra.run.dir=run")
        wait_for_rows(process, store, rows)
        process.kill()
        process.communicate()
    process = start(tmp_path, store, *QUICK, "hydra.run.dir=run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert result(tmp_path / "run")["metrics"] == result(undisturbed / "run")["metrics"]
    kept, lost = files(tmp_path / "run"), files(undisturbed / "run")
    assert kept == lost


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_and_the_same_command_resumes(
    start: Start, undisturbed: Path, tmp_path: Path, signum: int, code: int
) -> None:
    store = tmp_path / "store"
    process = start(tmp_path, store, *QUICK, "hydra.run.dir=run")
    wait_for_rows(process, store, 2)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert f"stopped by {signal.Signals(signum).name}; run the same command to resume" in errors
    assert "Traceback" not in errors
    assert result(tmp_path / "run")["status"] == "interrupted"
    process = start(tmp_path, store, *QUICK, "hydra.run.dir=run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert statuses(tmp_path / "run")["joint"] == "resumed"
    assert result(tmp_path / "run")["metrics"] == result(undisturbed / "run")["metrics"]


def test_two_concurrent_runs_train_every_stage_once(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    pair = [start(tmp_path, store, *QUICK, f"hydra.run.dir=run{n}") for n in (1, 2)]
    for process in pair:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    found = [statuses(tmp_path / f"run{n}") for n in (1, 2)]
    for name in found[0]:
        assert sorted(run[name] for run in found) == ["ran", "reused"], name
    expected = result(undisturbed / "run")["metrics"]
    assert [result(tmp_path / f"run{n}")["metrics"] for n in (1, 2)] == [expected, expected]


def test_a_truncated_checkpoint_is_named_and_the_previous_one_is_used(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    overrides = (*QUICK, "hydra.run.dir=run")
    process = start(tmp_path, store, *overrides)
    wait_for_rows(process, store, 8)
    process.kill()
    process.communicate()
    newest = max(store.rglob("step_*.pt"), key=lambda path: path.stat().st_mtime_ns)
    os.truncate(newest, newest.stat().st_size // 2)
    process = start(tmp_path, store, *overrides)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    said = (tmp_path / "run" / "run.log").read_text()
    assert f"cannot read checkpoint {newest}" in said
    assert "falling back to step_" in said
    assert result(tmp_path / "run")["metrics"] == result(undisturbed / "run")["metrics"]


def test_another_run_starts_from_a_checkpoint(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    weights = undisturbed / "run" / "stages" / "1_pretrain" / "weights.pt"
    overrides = (
        *QUICK,
        f"init_from={weights}",
        "~stage.pretrain",
        "~stage.choose_clusters",
        "model.clusters=10",
        "hydra.run.dir=run",
    )
    process = start(tmp_path, tmp_path / "store", *overrides)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "init_from: " in (tmp_path / "run" / "run.log").read_text()
    assert next(iter(statuses(tmp_path / "run"))) == "init_clusters"
