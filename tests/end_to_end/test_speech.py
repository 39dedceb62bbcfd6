"""All of `experiment=speech_quick` with the real command: a run, its reuse, a kill and a resume."""

import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]
STAGES = [
    "base",
    "extract",
    "cluster",
    "gate",
    "experts",
    "asr",
    "baselines",
    "evaluate",
    "figures",
]
QUICK = ("experiment=speech_quick", "stage.extract.every=4", "hardware=cpu", "hardware.workers=0")


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """The metrics that a resumed run must repeat: all but the numbers of trained experts."""
    skipped = ("experts/trained", "experts/reused")
    return {name: value for name, value in found["metrics"].items() if name not in skipped}


@pytest.fixture(autouse=True)
def _own_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGESWEEP_FEATURES", str(tmp_path / "features"))


def test_a_run_its_reuse_and_a_killed_run(stagesweep: Command, warm: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    stagesweep(*QUICK, "hydra.run.dir=first")
    took = time.monotonic() - started
    first = result(tmp_path / "first")
    assert [stage["name"] for stage in first["stages"]] == STAGES
    assert {stage["status"] for stage in first["stages"]} == {"ran"}
    figures = {path.stem for path in (tmp_path / "first").rglob("*.png")}
    assert {"clusters", "curves_asr", "expert_use", "wer"} <= figures
    stagesweep(*QUICK, "hydra.run.dir=second", "stage.asr.optimizer.lr=0.001")
    second = result(tmp_path / "second")
    status = [stage["status"] for stage in second["stages"]]
    assert status == ["reused"] * 5 + ["ran"] * 4
    environment = {"STAGESWEEP_STORE": str(tmp_path / "other")}
    moments = random.Random(0)
    for _ in range(3):
        process = warm.start([*QUICK, "hydra.run.dir=third"], tmp_path, environment)
        until = time.monotonic() + moments.uniform(0.1, 0.8) * took
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        time.sleep(0.1)
    stagesweep(*QUICK, "hydra.run.dir=third", STAGESWEEP_STORE=environment["STAGESWEEP_STORE"])
    assert numbers(result(tmp_path / "third")) == numbers(first)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.k=9", "model.k=9 must be between 1 and model.experts=4"),
        ("stage.extract.samples=2", "2 clips make no 4 clusters; extract more"),
        ("data.seconds=0.1", "data.seconds=0.1 is too short for data.words_each=1"),
    ],
)
def test_errors_that_a_user_can_fix_are_one_line(
    stagesweep: Command, override: str, message: str
) -> None:
    process = stagesweep(*QUICK, override, "stage.base.epochs=1", status=1)
    assert message in process.stderr
    assert "Traceback" not in process.stderr
