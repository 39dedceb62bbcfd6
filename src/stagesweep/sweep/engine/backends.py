"""Backends, which run the jobs of a sweep, and the choice of one for a launcher."""

import os
import time
from collections.abc import Iterator
from typing import Any, Protocol

from hydra.plugins.launcher import Launcher

from stagesweep.sweep.engine.job import Finished, Job, JobEvent
from stagesweep.sweep.engine.ray_backend import ray_backend
from stagesweep.sweep.engine.submitit_backend import submitit_backend
from stagesweep.sweep.engine.worker import failed
from stagesweep.sweep.study.states import Outcome


class Backend(Protocol):
    """Runs jobs: in the slots of this machine, on a cluster, or in batches of another launcher.

    ``prune_on`` is the metric that jobs report after each epoch, as ``<stage>/<name>``.
    """

    prune_on: str | None

    @property
    def free(self) -> bool:
        """Whether one more job can start."""

    @property
    def busy(self) -> bool:
        """Whether a job is running."""

    def start(self, job: Job) -> None:
        """Start a job."""

    def wait(self, seconds: float | None = None) -> Iterator[JobEvent]:
        """Yield the next events; nothing when none arrives within ``seconds``."""

    def answer(self, job: Job, stop: bool) -> None:
        """Tell a job that has reported a value whether to stop."""

    def stop(self, number: int | None = None) -> bool:
        """Tell all jobs, or those of one trial, to save and exit.

        Returns False when the backend cannot reach its jobs.
        """


def open_backend(launcher: Launcher) -> Backend:
    """The backend of a launcher.

    A launcher with a method ``open_backend`` has its own. Jobs of submitit and Ray are submitted
    one by one; all other launchers run them in batches.
    """
    if (own := getattr(launcher, "open_backend", None)) is not None:
        backend: Backend = own()
        return backend
    match type(launcher).__module__.split(".")[:2]:
        case ["hydra_plugins", "hydra_submitit_launcher"]:
            return submitit_backend(launcher)
        case ["hydra_plugins", "hydra_ray_launcher"]:
            return ray_backend(launcher)
    return BatchBackend(launcher)


class BatchBackend:
    """Runs jobs with any launcher of Hydra, which blocks until a whole batch has finished."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.prune_on: str | None = None
        config: Any = getattr(launcher, "config", None)
        slots = str(config.sweep.slots) if config is not None else "auto"
        joblib = getattr(launcher, "joblib", None) or {}
        size = int(joblib.get("n_jobs") or 1) if slots == "auto" else int(slots)
        self.size = size if size > 0 else (os.cpu_count() or 1)
        self.batch: list[Job] = []

    @property
    def free(self) -> bool:
        """Whether the batch has room."""
        return len(self.batch) < self.size

    @property
    def busy(self) -> bool:
        """Whether the batch has a job."""
        return bool(self.batch)

    def start(self, job: Job) -> None:
        """Add a job to the batch."""
        self.batch.append(job)

    def wait(self, seconds: float | None = None) -> Iterator[JobEvent]:
        """Launch the batch and yield the end of each job.

        A launcher numbers its jobs consecutively, so a gap in the numbers begins a new launch.
        """
        jobs, self.batch = self.batch, []
        if not jobs:
            time.sleep(seconds or 0.0)
        while jobs:
            count = next(
                (n for n in range(1, len(jobs)) if jobs[n].number != jobs[0].number + n), len(jobs)
            )
            group, jobs = jobs[:count], jobs[count:]
            overrides = [[*job.overrides, f"hydra.sweep.subdir='{job.subdir}'"] for job in group]
            returned = self.launcher.launch(overrides, initial_job_idx=group[0].number)
            for job, job_return in zip(group, returned, strict=True):
                yield Finished(job, self.outcome(job_return))

    def outcome(self, job_return: Any) -> Outcome:
        """The outcome of a job, from Hydra's ``JobReturn``."""
        try:
            return Outcome("complete", job_return.return_value)
        except Exception as error:
            return failed(error)

    def answer(self, job: Job, stop: bool) -> None:
        """Do nothing: these jobs report no values."""

    def stop(self, number: int | None = None) -> bool:
        """Return False: there is no connection to the jobs of a batch."""
        return False
