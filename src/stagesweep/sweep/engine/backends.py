"""Where a sweep's jobs run: slots of this machine, a cluster, or another launcher in batches."""

import os
import time
from collections.abc import Iterator
from typing import Any, Protocol

from hydra.plugins.launcher import Launcher

from stagesweep.base.errors import reason
from stagesweep.config.messages import explain
from stagesweep.sweep.engine import remote
from stagesweep.sweep.engine.slots import Ended, Event, Job
from stagesweep.sweep.plugin import SlotsLauncher
from stagesweep.sweep.study.states import Outcome


class Places(Protocol):
    """Where jobs run: slots of this machine, or another launcher of Hydra."""

    prune_on: str | None

    @property
    def free(self) -> bool:
        """Whether one more job can be started."""

    @property
    def busy(self) -> bool:
        """Whether a job runs."""

    def start(self, job: Job) -> None:
        """Start a job."""

    def wait(self, seconds: float | None = None) -> Iterator[Event]:
        """What jobs say, as soon as one says something."""

    def answer(self, job: Job, stop: bool) -> None:
        """Tell a job that has reported whether to stop."""

    def stop(self, number: int | None = None) -> bool:
        """Tell every job, or those of a trial, to save and end; False when none can be told."""


def opened_by(launcher: Launcher) -> Places:
    """Where a launcher runs jobs."""
    if isinstance(launcher, SlotsLauncher):
        return launcher.open()
    match type(launcher).__module__.split(".")[:2]:
        case ["hydra_plugins", "hydra_submitit_launcher"]:
            return remote.submitit(launcher)
        case ["hydra_plugins", "hydra_ray_launcher"]:
            return remote.ray(launcher)
    return Batches(launcher)


class Batches:
    """Another launcher of Hydra, which blocks until all it was given has ended."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.prune_on: str | None = None
        config: Any = getattr(launcher, "config", None)
        wanted = str(config.sweep.slots) if config is not None else "auto"
        own = getattr(launcher, "joblib", None) or {}
        size = int(own.get("n_jobs") or 1) if wanted == "auto" else int(wanted)
        self.size = size if size > 0 else (os.cpu_count() or 1)
        self.waiting: list[Job] = []

    @property
    def free(self) -> bool:
        """Whether the batch has room."""
        return len(self.waiting) < self.size

    @property
    def busy(self) -> bool:
        """Whether a job waits for the others of its batch."""
        return bool(self.waiting)

    def start(self, job: Job) -> None:
        """Put a job into the batch."""
        self.waiting.append(job)

    def wait(self, seconds: float | None = None) -> Iterator[Event]:
        """Launch the batch; consecutive numbers together."""
        jobs, self.waiting = self.waiting, []
        if not jobs:
            time.sleep(seconds or 0.0)
        while jobs:
            count = next(
                (n for n in range(1, len(jobs)) if jobs[n].number != jobs[0].number + n), len(jobs)
            )
            group, jobs = jobs[:count], jobs[count:]
            given = [[*job.overrides, f"hydra.sweep.subdir='{job.subdir}'"] for job in group]
            returned = self.launcher.launch(given, initial_job_idx=group[0].number)
            for job, one in zip(group, returned, strict=True):
                yield Ended(job, self.outcome(one))

    def outcome(self, returned: Any) -> Outcome:
        """How a job ended, from what Hydra's launchers return."""
        try:
            return Outcome("complete", returned.return_value)
        except Exception as error:
            said = (explain(error) or f"{type(error).__name__}: {error}").splitlines()[0]
            return Outcome("failed", None, reason(error), said)

    def answer(self, job: Job, stop: bool) -> None:
        """Nobody asks: such a job has no pipe to this process."""

    def stop(self, number: int | None = None) -> bool:
        """Nothing runs between two batches, and in one nobody listens."""
        return False
