"""SIGKILL at random moments of runs of several stages: ``python -m benchmarks.kills``.

A run that was killed is started again by the same command, until it ends; then another begins. At
the end its results are compared with those of a run that nobody disturbed, bit by bit. Each run is
the real command in a process forked from a warm one, as in the tests.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.sweep.lab import ROOT, machine, options, verdict

sys.path.append(str(ROOT / "tests"))
if TYPE_CHECKING:
    from conftest import Process

OVERRIDES = (
    "experiment=tiny",
    "stage.pretrain.epochs=8",
    "stage.joint.epochs=8",
    "~stage.evaluate",
    "objective.metric=joint/train_loss",
    "hydra.run.dir=run",
)


def main(argv: Sequence[str]) -> int:
    """Kill, print a line for each, and say what held."""
    from conftest import Warm

    given = options(__doc__, argv, kills=(200, 3), seed=(0, 0))
    chance, folder = random.Random(given.seed), Path(tempfile.mkdtemp(prefix="stagesweep-kills-"))
    print(machine())
    bench = Bench(folder, Warm(folder))
    bench.begin("undisturbed")
    began = time.monotonic()
    assert bench.start().wait(300) == 0, "the undisturbed run failed"
    seconds, expected = time.monotonic() - began, results(bench.run)
    killed = ended = 0
    faults: list[str] = []
    in_stages = 0
    while killed < given.kills:
        bench.begin(f"run_{ended}")
        while True:
            process = bench.start()
            moment = time.monotonic() + chance.uniform(0, seconds)
            while process.poll() is None and (time.monotonic() < moment or killed >= given.kills):
                time.sleep(0.002)
            if process.poll() is not None:
                break
            process.kill()
            process.wait(60)
            killed += 1
            in_stages += any((bench.run / "stages").glob("*")) or any(bench.store.glob("??/*/*"))
            print(f"{killed:4}. kill, of run {ended}", flush=True)
        ended += 1
        if process.returncode != 0:
            faults.append(f"run {ended} ended with status {process.returncode}: {process.output()}")
        elif (found := results(bench.run)) != expected:
            names = [name for name in expected if found.get(name) != expected[name]]
            faults.append(f"run {ended}: other {', '.join(names)}")
        elif left := [str(file) for file in bench.store.rglob("*.tmp")]:
            faults.append(f"run {ended}: half-written {left}")
    bench.warm.server.communicate()
    shutil.rmtree(folder)
    return verdict(
        (killed >= given.kills, f"{killed} kills, {in_stages} of them after stages had begun"),
        (
            ended > 0 and not faults,
            f"{ended} runs ended bit-equal to the undisturbed {faults or ''}",
        ),
    )


class Bench:
    """A folder in which one run after the other is done, each with a store of its own."""

    def __init__(self, folder: Path, warm: Any) -> None:
        self.folder, self.warm = folder, warm

    def begin(self, name: str) -> None:
        """Begin another run."""
        self.here = self.folder / name
        self.here.mkdir()
        self.run, self.store = self.here / "run", self.here / "store"

    def start(self) -> "Process":
        """Start the command."""
        arguments = [f"--config-dir={ROOT / 'tests' / 'conf'}", *OVERRIDES]
        process: Process = self.warm.start(
            arguments, self.here, {"STAGESWEEP_STORE": str(self.store)}
        )
        return process


def results(run: Path) -> dict[str, Any]:
    """Every number that a run has left: metrics, rows of epochs, weights and artifacts."""
    report = json.loads((run / "result.json").read_text())
    found: dict[str, Any] = {"metrics": [stage["metrics"] for stage in report["stages"]]}
    for file in sorted((run / "stages").rglob("*")):
        name = str(file.relative_to(run))
        if file.name == "weights.pt":
            model = torch.load(file, weights_only=True)["model"]
            found[name] = {key: value.numpy().tobytes() for key, value in model.items()}
        elif file.suffix == ".npz":
            found[name] = {key: value.tobytes() for key, value in np.load(file).items()}
        elif file.suffix == ".csv":
            found[name] = file.read_bytes()
        elif file.name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    # NaN is not equal to itself, and its text is.
    return {name: repr(value) for name, value in found.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
