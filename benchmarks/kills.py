"""SIGKILL at random moments of runs of several stages: ``python -m benchmarks.kills``.

A run that was killed is started again with the same config, until it ends; then another begins. At
the end its results are compared with those of a run that nobody disturbed, bit by bit. The config
is composed, validated and planned once; each start is a forked process that executes its stages, as
the command does then. So all kills fall into stages.
"""

import gc
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import execution_whitelist
from omegaconf import OmegaConf, open_dict, read_write

import stagesweep
from benchmarks.sweep.lab import ROOT, describe_machine, options, verdict
from stagesweep.base import compat
from stagesweep.config import register, trust
from stagesweep.config.nodes import hardware_settings
from stagesweep.hardware import environment
from stagesweep.hardware.throughput import SPEED
from stagesweep.parallel import launch
from stagesweep.run.plan import plan
from stagesweep.run.runner import run_stages

OVERRIDES = (
    "experiment=tiny",
    "stage.pretrain.epochs=8",
    "stage.joint.epochs=8",
    "~stage.evaluate",
    "objective.metric=joint/train_loss",
)


def main(argv: Sequence[str]) -> int:
    """Kill, print a line for each, and say what held."""
    given = options(__doc__, argv, kills=(200, 3), seed=(0, 0))
    chance, folder = random.Random(given.seed), Path(tempfile.mkdtemp(prefix="stagesweep-kills-"))
    print(describe_machine())
    bench = Bench(folder)
    bench.begin("undisturbed")
    began = time.monotonic()
    assert os.waitpid(bench.start(), 0)[1] == 0, (bench.here / "output.txt").read_text()
    seconds, expected = time.monotonic() - began, results(bench.run)
    killed = ended = 0
    faults: list[str] = []
    in_stages = 0
    while killed < given.kills:
        bench.begin(f"run_{ended}")
        while True:
            process, ending = bench.start(), (0, 0)
            # A part of the time of a whole run: one that goes on is shorter.
            moment = time.monotonic() + chance.uniform(0, seconds / 3)
            while not (ending := os.waitpid(process, os.WNOHANG))[0]:
                if time.monotonic() > moment and killed < given.kills:
                    break
                time.sleep(0.001)
            if ending[0]:
                break
            os.kill(process, signal.SIGKILL)
            if os.waitpid(process, 0)[1] != signal.SIGKILL:
                continue  # it had just ended
            killed += 1
            in_stages += any(bench.store.glob("??/*/*"))
            print(f"{killed:4}. kill, of run {ended}", flush=True)
        ended += 1
        if ending[1] != 0:
            faults.append(f"run {ended} failed: {(bench.here / 'output.txt').read_text()[-500:]}")
        elif (found := results(bench.run)) != expected:
            names = [name for name in expected if found.get(name) != expected[name]]
            faults.append(f"run {ended}: other {', '.join(names)}")
        elif left := [str(file) for file in bench.store.rglob("*.tmp")]:
            faults.append(f"run {ended}: half-written {left}")
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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        register.register()
        for module in pkgutil.walk_packages(stagesweep.__path__, "stagesweep."):
            if module.name not in ("stagesweep.__main__", "stagesweep.cli"):
                import_module(module.name)
        import_module(compat.OPTIMIZER_IMPORTS)
        with initialize_config_dir(str(register.folder())):
            place = f"hydra.searchpath=[{(ROOT / 'tests' / 'conf').as_uri()}]"
            self.config = compose("config", [place, *OVERRIDES], return_hydra_config=True)
        self.own = OmegaConf.masked_copy(self.config, [k for k in self.config if k != "hydra"])
        settings = hardware_settings(self.own)
        environment.set_variables(settings)
        HydraConfig.instance().set_config(self.config)
        self.plan = plan(self.own, settings)
        gc.freeze()

    def begin(self, name: str) -> None:
        """Begin another run."""
        self.here = self.folder / name
        self.here.mkdir()
        self.run, self.store = self.here / "run", self.here / "store"

    def start(self) -> int:
        """Start the run in a forked process; return its id."""
        child = os.fork()
        if not child:
            try:
                self.execute()
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        return child

    def execute(self) -> None:
        """Execute the config in this process, as the command does."""
        os.chdir(self.here)
        os.environ["STAGESWEEP_STORE"] = str(self.store)
        stream = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(stream, descriptor)
        with open_dict(self.config), read_write(self.config.hydra):
            self.config.hydra.runtime.output_dir = str(self.run)
            HydraConfig.instance().set_config(self.config)
        with execution_whitelist(trust.trusted()), launch.process_group_led():
            run_stages(self.own, self.plan.fingerprints)


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
            found[name] = [{k: v for k, v in row.items() if k not in SPEED} for row in rows]
    # NaN is not equal to itself, and its text is.
    return {name: repr(value) for name, value in found.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
