"""Cost of a study's storage for each trial: ours, and those of Optuna.

    python -m benchmarks.storage [--small]

Each storage holds 200 or 2,000 finished trials. Then trials are run as the controller runs them:
the list of trials, a proposal with three parameters and a user attribute, an end with another one.
The sampler is random, so that it costs little. Storages take turns, round by round.

* `SingleWriterStorage`: ours, one transaction for a proposal and one for an end.
* `RDBStorage`: as `optuna.create_study` uses it, with Optuna's cache of finished trials.
* `RDBStorage, no cache`: the same without that cache.
* `JournalStorage`: Optuna's log file, which its dashboards read, but no SQL tool.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks.sweep.lab import describe_machine
from stagesweep.sweep.study.storage import SingleWriterStorage

OVERRIDES = ["stage.joint.optimizer.lr=0.001", "model.width=64", "loss=elbo"]
SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
    "width": optuna.distributions.IntDistribution(16, 256),
    "loss": optuna.distributions.CategoricalDistribution(["elbo", "mse"]),
}


class NoCache:
    """Hides from Optuna that a storage is an `RDBStorage`, which it would give a cache."""

    def __init__(self, storage: BaseStorage) -> None:
        self.storage = storage

    def call(self, name: str, *given: Any, **named: Any) -> Any:
        """Call a method of the storage."""
        return getattr(self.storage, name)(*given, **named)


METHODS = {
    name: partialmethod(NoCache.call, name) for name in dir(BaseStorage) if not name.startswith("_")
}
Uncached: Any = type("Uncached", (NoCache, BaseStorage), METHODS)

STORAGES: dict[str, Callable[[Path], BaseStorage]] = {
    "SingleWriterStorage": lambda folder: SingleWriterStorage(database(folder)),
    "RDBStorage": lambda folder: RDBStorage(database(folder)),
    "RDBStorage, no cache": lambda folder: Uncached(RDBStorage(database(folder))),
    "JournalStorage": lambda folder: JournalStorage(JournalFileBackend(str(folder / "journal"))),
}


def database(folder: Path) -> str:
    """The URL of the database in a folder."""
    return f"sqlite:///{folder / 'study.db'}"


def prepare(folder: Path, name: str, size: int) -> tuple[optuna.Study, BaseStorage]:
    """A study with `size` finished trials, loaded, and its storage."""
    finished = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for value in range(size):
        trial = finished.ask(SPACE)
        trial.set_user_attr("overrides", OVERRIDES)
        trial.set_user_attr("seconds", 1.5)
        finished.tell(trial, float(value))
    trials = finished.get_trials(deepcopy=False)
    if name == "JournalStorage":
        optuna.create_study(study_name="s", storage=STORAGES[name](folder)).add_trials(trials)
    else:
        writer = SingleWriterStorage(database(folder))
        study = optuna.create_study(study_name="s", storage=writer)
        with writer.transaction():
            study.add_trials(trials)
    storage = STORAGES[name](folder)
    sampler = optuna.samplers.RandomSampler(seed=1)
    loaded = optuna.load_study(study_name="s", storage=storage, sampler=sampler)
    loaded.get_trials(deepcopy=False)
    return loaded, storage


def run(study: optuna.Study, storage: BaseStorage, count: int) -> tuple[float, float]:
    """Run trials as the controller does; wall and CPU time of each in milliseconds."""
    block = storage.transaction if isinstance(storage, SingleWriterStorage) else nullcontext
    wall, cpu = time.perf_counter(), time.process_time()
    for value in range(count):
        study.get_trials(deepcopy=False)
        with block():
            trial = study.ask(SPACE)
            trial.set_user_attr("overrides", OVERRIDES)
        with block():
            trial.set_user_attr("seconds", 1.5)
            study.tell(trial.number, float(value))
        study.get_trials(deepcopy=False)
    each = 1e3 / count
    return (time.perf_counter() - wall) * each, (time.process_time() - cpu) * each


def measure(size: int, rounds: int, count: int) -> None:
    """Print a table for studies of one size."""
    with tempfile.TemporaryDirectory(prefix="stagesweep-bench-") as place:
        opened = {}
        for name in STORAGES:
            folder = Path(place) / name.replace(" ", "_")
            folder.mkdir()
            opened[name] = prepare(folder, name, size)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in STORAGES}
        for _ in range(rounds):
            for name, (study, storage) in opened.items():
                times[name].append(run(study, storage, count))
    print(f"\n{size} trials{'wall':>25}{'CPU':>13}{'x ours':>10}{'CPU':>8}")
    ours = times["SingleWriterStorage"]
    for name, found in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        pairs = list(zip(found, ours, strict=True))
        ratios = [statistics.median(a[n] / b[n] for a, b in pairs) for n in (0, 1)]
        print(f"{name:22}{wall:>9.2f} ms{cpu:>10.2f} ms{ratios[0]:>10.2f}{ratios[1]:>8.2f}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a smoke run")
    small = parser.parse_args().small
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(describe_machine())
    for size in (20,) if small else (200, 2000):
        measure(size, rounds=1 if small else 5, count=2 if small else 5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
