"""The job script of the guide, with the signals that Slurm sends: the job is requeued."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Warm

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
QUICK = (
    f"--config-dir={Path(__file__).parents[1] / 'conf'} experiment=tiny stage.pretrain.epochs=1 "
    "stage.joint.epochs=40 stage.joint.save_every=3 stage.joint.save_seconds=0 "
    "~stage.evaluate objective.metric=joint/val_loss"
)
RUN = "stagesweep experiment=digits hydra.run.dir=outputs/digits/first"


class Cluster:
    """A folder, and a PATH with a `scontrol` that records its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name, text in {
            "stagesweep": f'exec {sys.executable} -m stagesweep "$@"',
            "scontrol": f'echo "$@" >> {folder / "asked"}',
        }.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "STAGESWEEP_STORE": str(self.store),
            "OMP_NUM_THREADS": "1",
        }

    def job(self, command: str) -> "subprocess.Popen[str]":
        """The guide's script with another command in it."""
        (script,) = re.findall(r"#!/bin/bash\n#SBATCH.*?(?=```)", GUIDE.read_text(), re.DOTALL)
        assert script.count(RUN) == 1
        return subprocess.Popen(
            ["bash", "-c", script.replace(RUN, command)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def epochs(self) -> int:
        found = [path.read_text() for path in self.store.rglob("metrics.jsonl")]
        return sum(text.count('"stage": "joint"') for text in found)


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm: "Warm") -> dict[str, Any]:
    """The result of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    own = {"STAGESWEEP_STORE": str(folder / "store")}
    process = warm.run([*QUICK.split(), "hydra.run.dir=run"], folder, own)
    assert process.returncode == 0, process.stderr
    return result(folder / "run")


@pytest.mark.parametrize(
    ("command", "signals", "place"),
    [
        # A preempted job gets SIGTERM.
        ("stagesweep hydra.run.dir=run", [signal.SIGUSR1, signal.SIGTERM], "run"),
        (
            "stagesweep -m seed=0,1 sweep.slots=1 hydra.sweep.dir=sweep",
            [signal.SIGUSR1],
            "sweep/0",
        ),
    ],
    ids=["run", "sweep"],
)
def test_a_job_saves_is_requeued_and_resumes(
    tmp_path: Path, undisturbed: dict[str, Any], command: str, signals: Sequence[int], place: str
) -> None:
    cluster = Cluster(tmp_path)
    for times, signum in enumerate(signals, 1):
        epochs = cluster.epochs()
        process = cluster.job(f"{command} {QUICK}")
        while cluster.epochs() < epochs + 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 138, errors
        assert "stopped by SIGUSR1; run the same command to resume" in errors
        assert "Traceback" not in errors
        assert (tmp_path / "asked").read_text() == "requeue 7\n" * times
    process = cluster.job(f"{command} {QUICK}")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * len(signals), "it has ended"
    found = result(tmp_path / place)
    assert {stage["name"]: stage["status"] for stage in found["stages"]}["joint"] == "resumed"
    assert found["metrics"] == undisturbed["metrics"]
