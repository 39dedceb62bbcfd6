"""The controller of a sweep: what ends is recorded, what is free is filled, until all is done.

The only writer of the study. Trials say how far they are and are told whether to go on.
"""

import logging
import os
import shlex
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from stagesweep.config import Search
from stagesweep.errors import Interrupted, UserError, reason
from stagesweep.explain import explain
from stagesweep.sweep import ending, study
from stagesweep.sweep.plugin import SlotsLauncher
from stagesweep.sweep.slots import At, Ended, Event, Job, Outcome, Report
from stagesweep.sweep.space import ABLATION, Space, parse
from stagesweep.sweep.study import Study, Trial

log = logging.getLogger(__name__)

LOCK = ".lock"
# Reasons to start a trial again: the next attempt may end otherwise.
RETRIED = ("killed", "oom")


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

    def stop(self) -> None:
        """Tell every job to save and end."""


def sweep(
    config: DictConfig, sweeper: DictConfig, launcher: Launcher, arguments: Sequence[str]
) -> None:
    """Run a sweep, or what is left of it; UserError for what no trial could do."""
    settings = OmegaConf.to_object(config.search)
    assert isinstance(settings, Search)
    space = parse(
        config.search.space,
        without_hydra(arguments),
        together=settings.zip,
        when=settings.when,
        variants=settings.ablation.variants,
        leave_one_out=settings.ablation.leave_one_out,
    )
    grid = str(sweeper.sampler.get("_target_", "")).endswith("GridSampler")
    if not space.parameters and not grid:
        raise UserError(
            "nothing to search; choose search/space=<name>, or sweep a key: "
            "'stage.<name>.optimizer.lr=interval(1e-4, 1e-2)'"
        )
    points = list(space.points(settings.max_points)) if grid else None
    pruner = chosen_pruner(settings)
    check(config, space, launcher)
    about = {"space": space.fingerprint(), "config": study.plain(config)}
    folder = place(config, sweeper, space, about)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if study.recorded(folder) is None:
            command = shlex.join(["stagesweep", "-m", *arguments])
            names = {"study": sweeper.study_name, "storage": sweeper.storage}
            study.record(folder, {"command": command, **names, **about})
        opened = Study(folder, sweeper, settings, space, points, pruner)
        places: Places = (
            launcher.open() if isinstance(launcher, SlotsLauncher) else Batches(launcher)
        )
        if pruner is not None:
            places.prune_on = settings.prune_on or config.objective.metric
        controller = Controller(opened, places, config, settings)
        try:
            with signals(controller):
                controller.run()
        finally:
            controller.board.close()
            ending.sum_up(config, opened)
    controller.leave()


class Controller:
    """One sweep under way."""

    def __init__(self, opened: Study, places: Places, config: DictConfig, settings: Search) -> None:
        self.study, self.places, self.config, self.settings = opened, places, config, settings
        self.queue = deque[Job]()
        self.trials: dict[int, Trial] = {}
        self.outcomes: dict[int, dict[str, Outcome]] = {}
        self.retries: dict[str, int] = {}
        self.began = time.monotonic()
        self.stopped: int | None = None
        # Reports of a metric that is better the other way are recorded with the other sign.
        other = settings.prune_mode not in (None, config.objective.mode)
        self.sign = -1.0 if other else 1.0
        self.board = ending.Board(opened, config)

    def run(self) -> None:
        """Until every trial has ended, or a signal has come and the trials have saved."""
        for trial in self.study.unfinished():
            self.begin(trial)
        while True:
            self.fill()
            if not self.trials:
                return
            for event in self.places.wait():
                self.handle(event)
            if self.stopped is not None and not self.places.busy:
                return

    def fill(self) -> None:
        """Start what waits, and new trials while there is room."""
        while self.stopped is None and self.places.free:
            if self.queue:
                self.start(self.queue.popleft())
            elif self.out_of_time() or (trial := self.study.ask()) is None:
                return
            else:
                self.begin(trial)

    def out_of_time(self) -> bool:
        """Whether the sweep begins no more trials."""
        budget = self.settings.budget
        return budget is not None and time.monotonic() - self.began > budget

    def begin(self, trial: Trial) -> None:
        """Put the runs of a trial into the queue, but for those that are done."""
        if (first := self.study.first(trial)) != trial.number:
            log.info("#%d is #%d again and is not run", trial.number, first)
            if (known := self.study.told(first)) is not None:
                self.study.tell(Trial(first, trial.overrides), [known])
            return
        trial.begun = time.monotonic()
        self.trials[trial.number] = trial
        self.outcomes[trial.number] = {}
        for job in self.jobs(trial):
            done = study.on_disk(self.study.folder / job.subdir)
            if done is not None:
                self.outcomes[trial.number][job.subdir] = done
            else:
                self.queue.append(job)
        self.conclude(trial)

    def jobs(self, trial: Trial) -> list[Job]:
        """The runs of a trial: one, or one for each repeat."""
        timeout, number = self.settings.timeout, trial.number
        fixed = self.study.space.fixed
        if self.settings.repeats == 1:
            return [Job(number, str(number), [*trial.overrides, *fixed], timeout)]
        first = int(self.config.seed)
        seeds = [f"seed={first + n}" for n in range(self.settings.repeats)]
        rest = [each for each in fixed if not each.startswith("seed=")]
        return [
            Job(number, f"{number}/{n}", [*trial.overrides, *rest, seed], timeout)
            for n, seed in enumerate(seeds)
        ]

    def start(self, job: Job) -> None:
        """Start a run."""
        self.board.started(job, self.trials[job.number])
        self.places.start(job)

    def handle(self, event: Event) -> None:
        """Answer a report, or record an end."""
        match event:
            case Report(job, value, step):
                self.places.answer(job, self.study.report(job.number, self.sign * value, step))
            case At(job, text):
                self.board.at(job, text)
            case Ended(job, outcome):
                self.board.ended(job)
                self.end(job, outcome)

    def end(self, job: Job, outcome: Outcome) -> None:
        """Record the end of a run; one that was killed starts again."""
        if outcome.state == "interrupted":
            return
        tried = self.retries.get(job.subdir, 0)
        if outcome.reason in RETRIED and tried < self.settings.max_retries:
            self.retries[job.subdir] = tried + 1
            self.study.note(job.number, retries=tried + 1)
            log.warning("#%s %s (%s); again", job.subdir, outcome.reason, outcome.message)
            self.queue.appendleft(Job(job.number, job.subdir, job.overrides, self.settings.timeout))
            return
        self.outcomes[job.number][job.subdir] = outcome
        self.conclude(self.trials[job.number])

    def conclude(self, trial: Trial) -> None:
        """Record the end of a trial when all its runs have ended."""
        outcomes = self.outcomes[trial.number]
        if len(outcomes) < self.settings.repeats:
            return
        seconds, reused = ending.cost(self.study.folder, outcomes)
        if seconds is None:
            seconds = time.monotonic() - trial.begun
        ended = self.study.tell(trial, list(outcomes.values()), seconds=seconds, reused=reused)
        del self.trials[trial.number], self.outcomes[trial.number]
        self.board.concluded(trial, ended, seconds)

    def stop(self, signum: int) -> None:
        """Let every trial save and end; those under way go on with the next start."""
        self.stopped = signum
        self.places.stop()

    def leave(self) -> None:
        """How the command ends: as interrupted, or with one line if too many trials failed."""
        if self.stopped is not None:
            said = "the same command goes on with what is left"
            name = signal.Signals(self.stopped).name
            raise Interrupted(self.stopped, f"sweep stopped by {name}; {said}")
        ended = [self.study.told(trial.number) for trial in self.study.trials()]
        failed = [each for each in ended if each is not None and each.state == "failed"]
        if ended and not any(each is not None and each.state == "complete" for each in ended):
            why = f"; the first: {failed[0].message}" if failed else ""
            raise UserError(f"none of {len(ended)} trials finished{why}")
        if len(failed) > self.settings.max_failure_rate * len(ended):
            raise UserError(
                f"{len(failed)} of {len(ended)} trials failed, more than "
                f"search.max_failure_rate={self.settings.max_failure_rate:g} allows; "
                f"the first: {failed[0].message}"
            )


def opened_by(launcher: Launcher) -> Places:
    """Where a launcher runs jobs."""
    return launcher.open() if isinstance(launcher, SlotsLauncher) else Batches(launcher)


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

    def stop(self) -> None:
        """Nothing runs between two batches."""


# ------------------------------------------------------------------ before the first trial


def without_hydra(arguments: Sequence[str]) -> list[str]:
    """The overrides that are the trials' own."""
    return [each for each in arguments if not each.lstrip("+~").startswith(("hydra.", "hydra/"))]


def chosen_pruner(settings: Search) -> Any:
    """The pruner; None when every trial runs to its end."""
    if not settings.pruner:
        return None
    return instantiate(settings.pruner, _execution_whitelist_=("optuna.*",))


def check(config: DictConfig, space: Space, launcher: Launcher) -> None:
    """Validate what the trials share; what is swept may still be open and is checked in each."""
    from stagesweep.validate import validate

    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    swept = {o.get_key_element() for o in overrides if o.is_sweep_override()}
    swept |= {key for name in space.distributions for key in name.split(",")} - {ABLATION}
    shared = config.copy()
    OmegaConf.set_readonly(shared, False)
    with open_dict(shared):
        del shared["hydra"]
    groups = set(config.hydra.runtime.choices)
    if not swept & groups:
        for key in filter(partial(absent, shared), sorted(swept)):
            # Composition says it as for a single run.
            context: Any = getattr(launcher, "hydra_context", None)
            context.config_loader.load_sweep_config(config, [f"{key}=null"])
        if not any(OmegaConf.is_missing(shared, key) for key in swept):
            validate(shared)
    if config.search.repeats > 1 and "seed" in swept:
        raise UserError("search.repeats runs each point under several seeds; do not sweep seed")


def absent(config: DictConfig, key: str) -> bool:
    """Whether no trial can have that key, whatever its value."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return key[0].isalpha() and isinstance(node, DictConfig) and leaf not in node.keys()  # noqa: SIM118


def place(config: DictConfig, sweeper: DictConfig, space: Space, about: dict[str, Any]) -> Path:
    """The folder of the sweep: a new one, or one that was begun with the same settings."""
    base, wanted = Path(config.hydra.sweep.dir), config.sweep.on_change
    if wanted not in ("refuse", "continue", "new"):
        raise UserError(f"sweep.on_change={wanted} must be refuse, continue or new")
    folder, count, name = base, 1, str(sweeper.study_name)
    while (before := study.recorded(folder)) is not None:
        lines = study.changes(space, about, before)
        if not lines or wanted == "continue":
            sweeper.study_name = before["study"]
            if lines:
                log.warning("going on with changed settings: %s", "; ".join(lines))
            break
        if wanted == "refuse":
            raise study.refuse_changed(folder, lines)
        count += 1
        folder = base.with_name(f"{base.name}_{count}")
    if before is None and folder.exists() and {path.name for path in folder.iterdir()} - {LOCK}:
        raise UserError(
            f"{folder} holds results already; give this sweep a name of its own with "
            "search.study=<name> (finished stages are not trained again)"
        )
    if folder != base:
        sweeper.storage = str(sweeper.storage).replace(str(base), str(folder))
        if before is None:
            sweeper.study_name = f"{name}_{count}"
    # Each trial is composed anew: its folder stays here, even when the experiment is swept.
    quoted = str(folder).replace("'", r"\'")
    with read_write(config.hydra), read_write(config.search):
        config.hydra.sweep.dir = str(folder)
        config.search.study = sweeper.study_name
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One controller at a time: UserError for a second."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another process is running the sweep in {folder}; wait for it, or name another "
            "with search.study=<name>"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def signals(controller: Controller) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into the orderly end of a sweep; a second one does not wait."""

    def handle(signum: int, _: FrameType | None) -> None:
        if controller.stopped is None and isinstance(
            getattr(controller.places, "running", 0), dict
        ):
            controller.stop(signum)
        else:
            controller.stopped = signum
            raise Interrupted(signum, "sweep stopped; the same command goes on with what is left")

    before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
