"""Runs jobs on a cluster and communicates with them through files.

There is no pipe to a job on another machine. It appends its reports to a file in its folder, and
reads another file for commands. The folder must be on a file system that both machines share.
"""

import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stagesweep.base.files import atomic_text
from stagesweep.sweep.engine.file_trial import COMMAND, REPORTS, run_on_cluster
from stagesweep.sweep.engine.job import Finished, Job, JobEvent, Report
from stagesweep.sweep.engine.worker import task_name
from stagesweep.sweep.space.compose import sweep_context
from stagesweep.sweep.study.states import Outcome

# Seconds between two polls of the jobs.
POLL = 0.5
# Seconds between telling a job to save and exit, and cancelling it.
GRACE = 60.0


class Handle(Protocol):
    """A job that was submitted."""

    def done(self) -> bool:
        """Whether it has ended, in any way."""

    def result(self) -> Any:
        """What `run_on_cluster` returned; raises when the job was killed."""

    def cancel(self) -> object:
        """Kill it."""


@dataclass
class _SubmittedJob:
    job: Job
    handle: Handle
    # Position in the file of reports.
    offset: int = 0


class FileBackend:
    """Submits jobs one by one and polls their files, so that no job waits for another.

    ``submit`` takes a function and its arguments; ``slots`` is how many jobs may run at once where
    ``sweep.slots`` is auto.
    """

    def __init__(self, launcher: Any, submit: Callable[..., Handle], slots: int) -> None:
        config: Any = launcher.config
        wanted = str(config.sweep.slots)
        self.size = slots if wanted == "auto" else max(1, int(wanted))
        self.folder, self.submit = Path(config.hydra.sweep.dir).absolute(), submit
        self.prune_on: str | None = None
        self.running: dict[str, _SubmittedJob] = {}
        self._shared = launcher.hydra_context, config, task_name(launcher.task_function)

    @property
    def free(self) -> bool:
        """Whether one more job can be submitted."""
        return len(self.running) < self.size

    @property
    def busy(self) -> bool:
        """Whether a job has been submitted and has not ended."""
        return bool(self.running)

    def start(self, job: Job) -> None:
        """Submit a job. Its timeout counts from its first report, not from its submission."""
        folder = self.folder / job.subdir
        for name in (REPORTS, COMMAND):
            (folder / name).unlink(missing_ok=True)
        variables = {key: text for key, text in os.environ.items() if key.startswith("STAGESWEEP_")}
        environment = (str(Path.cwd()), [path for path in sys.path if path], variables)
        arguments = (job.number, job.subdir, job.overrides, self.prune_on)
        work = pickle.dumps(sweep_context(*self._shared))
        handle = self.submit(run_on_cluster, environment, work, *arguments)
        self.running[job.subdir] = _SubmittedJob(job, handle)

    def wait(self, seconds: float | None = None) -> Iterator[JobEvent]:
        """Poll all jobs until one has an event; nothing after ``seconds``."""
        until = time.monotonic() + (seconds if seconds is not None else float("inf"))
        while time.monotonic() < until:
            events = [event for each in list(self.running.values()) for event in self.poll(each)]
            yield from events
            if events or any(each.job.stop_reason for each in self.running.values()):
                return
            time.sleep(POLL)

    def poll(self, submitted: _SubmittedJob) -> Iterator[JobEvent]:
        """Yield the new events of one job, and enforce its deadline."""
        # Asked before the reports are read: after the end of a job, its file is complete.
        done, job = submitted.handle.done(), submitted.job
        with suppress(FileNotFoundError), (self.folder / job.subdir / REPORTS).open("rb") as stream:
            stream.seek(submitted.offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # the job is still writing this line
                submitted.offset += len(line)
                if job.deadline == float("inf") and job.timeout is not None:
                    job.deadline = time.monotonic() + job.timeout
                value, step = json.loads(line)
                if value is not None:
                    yield Report(job, value, step)
        if done:
            del self.running[job.subdir]
            yield Finished(job, self.outcome(submitted))
        elif time.monotonic() >= job.deadline:
            if job.stop_reason is None:
                self.end(job, "timeout")
            else:
                submitted.handle.cancel()

    def outcome(self, submitted: _SubmittedJob) -> Outcome:
        """The outcome of a job that has ended."""
        try:
            outcome: Outcome = submitted.handle.result()
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            outcome = Outcome("failed", None, "killed", f"its process ended: {lines[-1]}")
        if outcome.state in ("complete", "pruned") or submitted.job.stop_reason is None:
            return outcome
        return submitted.job.outcome_when_stopped()

    def answer(self, job: Job, stop: bool) -> None:
        """Tell a job to stop; it reads this after its current epoch."""
        if stop:
            atomic_text(self.folder / job.subdir / COMMAND, "prune")

    def stop(self, number: int | None = None) -> bool:
        """Tell all jobs, or those of one trial, to save and exit."""
        for submitted in self.running.values():
            job = submitted.job
            if number in (None, job.number) and job.stop_reason is None:
                self.end(job, "interrupted")
        return True

    def end(self, job: Job, reason: str) -> None:
        """Tell a job to save and exit. It is cancelled if it has not done so after `GRACE`."""
        atomic_text(self.folder / job.subdir / COMMAND, "end")
        job.stop_reason, job.deadline = reason, time.monotonic() + GRACE
