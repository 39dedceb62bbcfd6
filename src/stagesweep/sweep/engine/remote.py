"""Jobs that another program runs, perhaps on other machines: submitit (Slurm) and Ray.

There is no pipe to such a job. It appends what it reports to a file in its trial's folder and
looks into another for what it is told, so that folder has to be on a file system that both see.
"""

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from stagesweep.base import trial
from stagesweep.base.files import atomic_text
from stagesweep.base.trial import Trial
from stagesweep.sweep.engine.job import name_of, run_to_end, write_to
from stagesweep.sweep.engine.slots import Ended, Event, Job, Report
from stagesweep.sweep.space.compose import SweepContext, sweep_context
from stagesweep.sweep.study.states import Outcome

REPORTS, ORDER = "reports.jsonl", "order.txt"
# Seconds between two looks at the jobs, and that one may take to save when it is told to end.
LOOK, GRACE = 0.5, 60.0


class Handle(Protocol):
    """A job in the hands of the other program."""

    def done(self) -> bool:
        """Whether it has ended, however."""

    def result(self) -> Any:
        """What `serve` returned; raises when it did not come that far."""

    def cancel(self) -> object:
        """End it at once."""


@dataclass
class _Running:
    job: Job
    handle: Handle
    read: int = field(default=0)


class Remote:
    """Jobs given away one by one, and looked after by their files: no job waits for another."""

    def __init__(self, launcher: Any, submit: Callable[..., Handle], room: int) -> None:
        config: Any = launcher.config
        wanted = str(config.sweep.slots)
        self.size = room if wanted == "auto" else max(1, int(wanted))
        self.folder, self.submit = Path(config.hydra.sweep.dir).absolute(), submit
        self.prune_on: str | None = None
        self.running: dict[str, _Running] = {}
        self._shared = launcher.hydra_context, config, name_of(launcher.task_function)

    @property
    def free(self) -> bool:
        """Whether one more job may be given away."""
        return len(self.running) < self.size

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return bool(self.running)

    def start(self, job: Job) -> None:
        """Give a job away; its time begins when it does."""
        folder = self.folder / job.subdir
        for name in (REPORTS, ORDER):
            (folder / name).unlink(missing_ok=True)
        own = {key: text for key, text in os.environ.items() if key.startswith("STAGESWEEP_")}
        where = (str(Path.cwd()), [path for path in sys.path if path], own)
        given = (job.number, job.subdir, job.overrides, self.prune_on)
        handle = self.submit(serve, where, pickle.dumps(sweep_context(*self._shared)), *given)
        self.running[job.subdir] = _Running(job, handle)

    def wait(self, seconds: float | None = None) -> Iterator[Event]:
        """What jobs have written, and which have ended."""
        until = time.monotonic() + (seconds if seconds is not None else float("inf"))
        while time.monotonic() < until:
            events = [event for each in list(self.running.values()) for event in self.look(each)]
            yield from events
            if events or any(each.job.stopping for each in self.running.values()):
                return
            time.sleep(LOOK)

    def look(self, each: _Running) -> Iterator[Event]:
        """What is new of a job."""
        ended = each.handle.done()  # before its file is read: then all of it is there
        file = self.folder / each.job.subdir / REPORTS
        with suppress(FileNotFoundError), file.open("rb") as stream:
            stream.seek(each.read)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # it is writing
                each.read += len(line)
                if each.job.deadline == float("inf") and each.job.timeout is not None:
                    each.job.deadline = time.monotonic() + each.job.timeout
                value, step = json.loads(line)
                if value is not None:
                    yield Report(each.job, value, step)
        if ended:
            del self.running[each.job.subdir]
            yield Ended(each.job, self.outcome(each))
        elif time.monotonic() >= each.job.deadline:
            if each.job.stopping is None:
                self.tell_to_end(each.job, "timeout")
            else:
                each.handle.cancel()

    def outcome(self, each: _Running) -> Outcome:
        """How a job ended."""
        try:
            found: Outcome = each.handle.result()
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            found = Outcome("failed", None, "killed", f"its process ended: {said[-1]}")
        if found.state in ("complete", "pruned") or each.job.stopping is None:
            return found
        if each.job.stopping == "timeout":
            return Outcome("failed", None, "timeout", f"ran longer than {each.job.timeout:g} s")
        return Outcome("interrupted")

    def answer(self, job: Job, stop: bool) -> None:
        """Tell a job to stop; it may be some epochs further by then."""
        if stop:
            atomic_text(self.folder / job.subdir / ORDER, "prune")

    def stop(self, number: int | None = None) -> bool:
        """Tell every job, or those of a trial, to save and end."""
        for each in self.running.values():
            if number in (None, each.job.number) and each.job.stopping is None:
                self.tell_to_end(each.job, "interrupted")
        return True

    def tell_to_end(self, job: Job, why: str) -> None:
        """A job looks for this after each epoch; one that does not is ended."""
        atomic_text(self.folder / job.subdir / ORDER, "end")
        job.stopping, job.deadline = why, time.monotonic() + GRACE


# ------------------------------------------------------------------ who runs them


def submitit(launcher: Any) -> Remote:
    """Jobs of submitit: on Slurm, or processes of this machine."""
    import submitit as library

    kind, given = launcher._EXECUTOR, dict(launcher.params)
    # As Hydra's launcher does it: some parameters make the executor, the others are a job's.
    made = {f"{kind}_{k}": given.pop(k) for k in ("max_num_timeout", "python") if k in given}
    executor = library.AutoExecutor(given.pop("submitit_folder"), cluster=kind, **made)
    common = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes"}
    common |= {"name", "stderr_to_stdout"}
    executor.update_parameters(
        **{k if k in common else f"{kind}_{k}": value for k, value in given.items()}
    )
    cores = (os.cpu_count() or 1) // (given.get("cpus_per_task") or 1)
    return Remote(launcher, executor.submit, int(given.get("array_parallelism") or cores or 1))


def ray(launcher: Any) -> Remote:
    """Tasks of Ray: on a cluster, or on this machine."""
    import ray as library

    asked: Any = OmegaConf.to_container(launcher.ray_cfg, resolve=True)
    init, remote = asked["init"], asked["remote"]
    if not library.is_initialized():
        # A local one needs no pages to watch it by.
        local = {} if init.get("address") else {"include_dashboard": False}
        library.init(**{"log_to_driver": False, **local, **init})

    class Task:
        """The handle of a task."""

        def __init__(self, *given: Any) -> None:
            # A process of its own for each; the controller tries again what is worth it.
            self.task = library.remote(max_calls=1, max_retries=0, **remote)(given[0])
            self.reference = self.task.remote(*given[1:])

        def done(self) -> bool:
            return bool(library.wait([self.reference], timeout=0)[0])

        def result(self) -> Any:
            return library.get(self.reference)

        def cancel(self) -> object:
            return library.cancel(self.reference, force=True)

    cores = library.cluster_resources().get("CPU", 1) // (remote.get("num_cpus") or 1)
    return Remote(launcher, Task, max(1, int(cores)))


# ------------------------------------------------------------------ in the job's process


class Writer(Trial):
    """A trial whose controller reads files."""

    def __init__(self, folder: Path, prune_on: str | None) -> None:
        self.folder, self.prune_on = folder, prune_on
        self.stopped = False

    def report(
        self, stage: str, metrics: Mapping[str, float], step: int, of: int | None = None
    ) -> None:
        """Write a line; without a value of interest it says only that the job lives."""
        name, _, metric = (self.prune_on or "").partition("/")
        value = metrics.get(metric) if name == stage else None
        self.write(value, step)

    def write(self, value: float | None, step: int) -> None:
        """Append a line to the reports."""
        # NaN is not reported: the run itself will say so.
        known = value if value is not None and abs(value) < float("inf") else None
        with (self.folder / REPORTS).open("a") as stream:
            stream.write(json.dumps([known, step]) + "\n")

    def should_stop(self) -> bool:
        """What the controller has written."""
        with suppress(FileNotFoundError):
            match (self.folder / ORDER).read_text():
                case "prune":
                    self.stopped = True
                case "end":
                    os.kill(os.getpid(), signal.SIGTERM)
        return self.stopped


def serve(
    where: tuple[str, list[str], dict[str, str]],
    pickled: bytes,
    number: int,
    subdir: str,
    overrides: list[str],
    prune_on: str | None,
) -> Outcome:
    """Run one job in this process; returns how it ended."""
    cwd, paths, environment = where
    os.chdir(cwd)
    os.environ.update(environment)
    sys.path.extend(path for path in paths if path not in sys.path)
    from stagesweep import cli  # noqa: F401  Hydra gets to know the package

    work: SweepContext = pickle.loads(pickled)
    folder = work.folder / subdir
    write_to(folder / "trial.log")
    writer = Writer(folder, prune_on)
    trial.become(writer)
    writer.write(None, 0)
    try:
        return run_to_end(writer, work, number, subdir, overrides)
    except (SystemExit, KeyboardInterrupt):
        return Outcome("interrupted", None, "killed", "it was told to end")
    finally:
        for standard in (sys.stdout, sys.stderr):
            standard.flush()
