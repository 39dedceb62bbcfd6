"""Shared parts of the sweep benchmarks: a folder, a toy experiment, and measured commands."""

import argparse
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml

ROOT = Path(__file__).parents[2]
NAMES = ("overhead", "kills", "busy", "duplicates", "reuse", "asha")
# Hydra's own Optuna sweeper; its study is in memory.
STOCK = ("hydra/sweeper=optuna", "hydra.sweeper.direction=maximize")
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Spent:
    """Time used by a command and all processes that it started, and its output."""

    wall: float
    cpu: float
    status: int
    said: str


class Lab:
    """A folder for sweeps, with the digits experiment reduced to one toy stage."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.log.mkdir(parents=True)
        (folder / "conf" / "experiment").mkdir(parents=True)
        (folder / "conf" / "experiment" / "toy.yaml").write_text(experiment(self.log))
        paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "STAGESWEEP_STORE": str(folder / "store"),
            "STAGESWEEP_TRUST": "benchmarks",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }

    def command(self, *overrides: str, program: Sequence[str] = ("-m", "stagesweep")) -> list[str]:
        """The command of a sweep of the toy experiment, or of the one in `overrides`."""
        return [
            sys.executable,
            *program,
            f"--config-dir={self.folder / 'conf'}",
            "-m",
            *([] if any(o.startswith("experiment=") for o in overrides) else ["experiment=toy"]),
            "hydra.sweep.dir=sweep",
            *overrides,
        ]

    def start(self, *overrides: str) -> "subprocess.Popen[bytes]":
        """Start a sweep in the background, without its output."""
        return subprocess.Popen(
            self.command(*overrides),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def sweep(self, *overrides: str, program: Sequence[str] = ("-m", "stagesweep")) -> Spent:
        """Run a sweep until all processes that it started have ended."""
        # Become the parent of the fork server's processes, which nothing else waits for.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        output = self.folder / "output.txt"
        began, cpu, status = time.perf_counter(), 0.0, 0
        with output.open("wb") as stream:
            command = self.command(*overrides, program=program)
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=stream, stderr=stream
            )
            wall = 0.0
            while True:
                try:
                    pid, ended, usage = os.wait4(-1, 0)
                except ChildProcessError:
                    break
                cpu += usage.ru_utime + usage.ru_stime
                if pid == process.pid:
                    wall = time.perf_counter() - began
                    process.returncode = status = os.waitstatus_to_exitcode(ended)
        said = output.read_text(errors="replace")
        if status != 0:
            raise SystemExit(f"{' '.join(command)} ended with {status}:\n{said[-2000:]}")
        return Spent(wall, cpu, status, said)

    @property
    def study(self) -> optuna.Study:
        """The study of the sweep."""
        storage = f"sqlite:///{self.folder / 'sweep' / 'study.db'}"
        name = optuna.study.get_all_study_names(storage)[0]
        return optuna.load_study(study_name=name, storage=storage)

    @property
    def calls(self) -> list[tuple[float, float, str]]:
        """Begin and end of each call of the toy stage, and its folder."""
        found = (file.read_text().split(maxsplit=2) for file in sorted(self.log.iterdir()))
        return sorted((float(a), float(b), folder) for a, b, folder in found)


def experiment(log: Path) -> str:
    """The digits experiment with the toy stage in place of its stages."""
    given: dict[str, Any] = yaml.safe_load((ROOT / "conf/experiment/digits.yaml").read_text())
    given["defaults"] = [
        each for each in given["defaults"] if not any("/stage@" in str(key) for key in each)
    ] + ["_self_"]
    toy = {"_target_": "benchmarks.sweep.toy.Toy", "log": str(log)}
    given["stage"] = {"toy": toy | {"x": 0.0, "y": 0.0, "z": 0.0, "seconds": 0.0, "steps": 0}}
    given["objective"] = {"metric": "toy/score", "mode": "max"}
    return "# @package _global_\n" + yaml.safe_dump(given, sort_keys=False)


@contextmanager
def lab() -> Iterator[Lab]:
    """A lab in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="stagesweep-bench-"))
    try:
        yield Lab(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def options(description: str, argv: Sequence[str], **sizes: tuple[int, int]) -> Any:
    """The size options of a benchmark: name=(default, value with --small)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="a smoke run")
    for name, (default, small) in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {default}, {small} with --small")
    found = parser.parse_args(argv)
    for name, (default, small) in sizes.items():
        if getattr(found, name) is None:
            setattr(found, name, small if found.small else default)
    return found


def describe_machine() -> str:
    """The processor, its load over the last minute, and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return (
        f"{names[0] if names else platform.machine()}, {cores} cores (load {load:.1f} before), "
        f"Python {platform.python_version()}, optuna {optuna.__version__}"
    )


def verdict(*claims: tuple[bool, str]) -> int:
    """Print each claim and whether it holds; returns the exit status."""
    for holds, text in claims:
        print(f"{'ok  ' if holds else 'FAIL'} {text}")
    return 0 if all(holds for holds, _ in claims) else 1
