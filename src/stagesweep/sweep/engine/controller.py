"""The controller of a sweep: what ends is recorded, what is free is filled, until all is done.

The only writer of the study. Trials say how far they are and are told whether to go on.
"""

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType

from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import Interrupted, NotFinite, UserError
from stagesweep.base.signals import SIGNALS
from stagesweep.config.schema import Search, objectives
from stagesweep.sweep.engine import console, setup
from stagesweep.sweep.engine.backends import Places, opened_by
from stagesweep.sweep.engine.slots import At, Ended, Event, Job, Report
from stagesweep.sweep.space.grammar import parse
from stagesweep.sweep.study import manifest
from stagesweep.sweep.study.budget import RECORD_INTERVAL, SweepTimer
from stagesweep.sweep.study.controllers import Coordinator, storage_errors
from stagesweep.sweep.study.states import Outcome, check_objective, read_outcome
from stagesweep.sweep.study.study import Study, Trial

log = logging.getLogger(__name__)

# Reasons to start a trial again: the next attempt may end otherwise.
RETRIED = ("killed", "oom")


def sweep(
    config: DictConfig, sweeper: DictConfig, launcher: Launcher, arguments: Sequence[str]
) -> None:
    """Run a sweep, or what is left of it; UserError for what no trial could do."""
    settings = OmegaConf.to_object(config.search)
    assert isinstance(settings, Search)
    space = parse(
        config.search.space,
        setup.without_hydra(arguments),
        zipped=settings.zip,
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
    aims = objectives(config.objective)
    pruner = setup.chosen_pruner(settings, list(aims))
    about = manifest.about(space, config)
    coordinator = Coordinator(sweeper.storage)
    with storage_errors(sweeper.storage), ExitStack() as held:
        with coordinator.lock():
            folder, begun = setup.place(config, sweeper, space, about)
            places = None if begun else opened_by(launcher)
            if places is not None:  # what was begun has been checked
                setup.check(config, space, launcher, places)
            folder.mkdir(parents=True, exist_ok=True)
            if coordinator.shared:
                setup.keep_secret(config, coordinator.url)
            else:
                held.enter_context(setup.locked(folder))
            setup.record(folder, sweeper, arguments, about)
            coordinator.url = sweeper.storage
            modes = list(aims.values())
            opened = Study(folder, sweeper, settings, space, points, pruner, modes, coordinator)
        try:
            if not opened.finished:
                places = places or opened_by(launcher)
                places.prune_on = setup.pruned_on(pruner, settings, next(iter(aims)))
                Controller(opened, places, config, settings).run()
        finally:
            console.sum_up(config, opened)
    console.judge(opened)


class Controller:
    """One sweep under way."""

    def __init__(self, opened: Study, places: Places, config: DictConfig, settings: Search) -> None:
        self.study, self.places, self.config, self.settings = opened, places, config, settings
        self.queue = deque[Job]()
        self.trials: dict[int, Trial] = {}
        # The runs of a trial by folder, None before they have ended; and those still to begin.
        self.outcomes: dict[int, dict[str, Outcome | None]] = {}
        self.left: dict[int, deque[Job]] = {}
        # Repeats of which a pruner may leave some out are run one after another.
        self.one_by_one = opened.pruner is not None and settings.repeats > 1
        self.by_repeats = self.one_by_one and places.prune_on is None
        self.retries: dict[str, int] = {}
        self.clock = SweepTimer(opened.optuna)
        self.out_of_time = False
        self.stopped: int | None = None
        # Reports of a metric that is better the other way are recorded with the other sign.
        mode = next(iter(objectives(config.objective).values()))
        self.sign = 1.0 if settings.prune_mode in (None, mode) else -1.0
        self.board = console.Board(opened, config)

    def run(self) -> None:
        """Until every trial has ended; Interrupted when a signal came and the trials have saved."""
        try:
            with signals(self), self.study.coordinator.heartbeat(self.study.optuna):
                self.loop()
        finally:
            self.board.close()
        if self.stopped is not None:
            said = "the same command goes on with what is left"
            name = signal.Signals(self.stopped).name
            raise Interrupted(self.stopped, f"sweep stopped by {name}; {said}")

    def loop(self) -> None:
        """Record what ends and fill what is free, until nothing is left."""
        if not self.study.coordinator.shared:  # or else each takes what it has room for
            for trial in self.study.unfinished():
                self.begin(trial)
        try:
            while True:
                self.fill()
                if not self.trials and not self.others():
                    return
                self.clock.tick()
                for event in self.places.wait(
                    self.study.coordinator.poll_interval or RECORD_INTERVAL
                ):
                    self.handle(event)
                self.give_up()
                if self.stopped is not None and not self.places.busy:
                    return
        finally:
            self.clock.tick(last=True)

    def others(self) -> bool:
        """Whether to wait for trials of other controllers: they may leave them to this one."""
        if not self.study.coordinator.shared or self.stopped is not None or self.out_of_time:
            return False
        return bool(self.study.running())

    def give_up(self) -> None:
        """End what others have taken over, if they may have taken this controller for dead."""
        if not self.study.coordinator.missed_heartbeat.is_set():
            return
        self.study.coordinator.missed_heartbeat.clear()
        for number in set(self.study.taken_over()) & self.trials.keys():
            log.warning("#%d was taken over by another controller while this one stood", number)
            self.queue = deque(job for job in self.queue if job.number != number)
            self.places.stop(number)
            del self.trials[number], self.outcomes[number], self.left[number]

    def fill(self) -> None:
        """Start what waits, and new trials while there is room."""
        while self.stopped is None and self.places.free:
            if self.queue:
                self.start(self.queue.popleft())
            elif self.spent() or (trial := self.study.ask()) is None:
                return
            else:
                self.begin(trial)

    def spent(self) -> bool:
        """Whether the sweep has had its time, and begins no more trials."""
        budget, spent = self.settings.budget, self.clock.elapsed
        over = budget is not None and spent > budget
        if over and not self.out_of_time:
            begun = len(self.study.trials())
            log.info(
                "search.budget=%g s is spent (%.0f s): no more trials begin (%d of %d have)",
                budget,
                spent,
                begun,
                self.study.total,
            )
        self.out_of_time = over
        return over

    def begin(self, trial: Trial) -> None:
        """Put the runs of a trial into the queue, but for those that are done."""
        if (first := self.study.first(trial)) != trial.number:
            log.info("#%d is #%d again and is not run", trial.number, first)
            if (known := self.study.outcome_of(first)) is not None:
                self.study.tell(Trial(first, trial.overrides), [known])
            return
        trial.begun = time.monotonic()
        self.trials[trial.number] = trial
        jobs = self.jobs(trial)
        self.outcomes[trial.number] = {job.subdir: None for job in jobs}
        self.left[trial.number] = deque(jobs)
        self.go_on(trial)

    def go_on(self, trial: Trial) -> None:
        """Queue what is left of a trial, or the next of it; record its end when all is done."""
        left = self.left[trial.number]
        while left:
            job = left.popleft()
            if (done := read_outcome(self.study.folder / job.subdir)) is not None:
                self.keep(job, done)
                continue
            self.queue.append(job)
            if self.one_by_one:
                break
        if None not in self.outcomes[trial.number].values():
            self.conclude(trial)

    def keep(self, job: Job, outcome: Outcome) -> None:
        """Remember how a run ended; when it decides for its trial, the rest is left out."""
        outcomes, left = self.outcomes[job.number], self.left[job.number]
        outcomes[job.subdir] = outcome = check_objective(outcome)
        over = outcome.state != "complete"
        if self.by_repeats and not over:
            over = self.study.report(job.number, outcome.value, job.repeat)
            self.trials[job.number].pruned = over and bool(left)
        if over:
            for rest in left:
                del outcomes[rest.subdir]
            left.clear()

    def jobs(self, trial: Trial) -> list[Job]:
        """The runs of a trial: one, or one for each repeat.

        Its own overrides come last, so that a variant can take out what the command line changes.
        """
        timeout, number = self.settings.timeout, trial.number
        fixed = self.study.space.fixed
        if self.settings.repeats == 1:
            return [Job(number, str(number), [*fixed, *trial.overrides], timeout)]
        first = int(self.config.seed)
        seeds = [f"seed={first + n}" for n in range(self.settings.repeats)]
        rest = [each for each in fixed if not each.startswith("seed=")]
        return [
            Job(number, f"{number}/{n}", [*rest, *trial.overrides, seed], timeout, n)
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
                # Of repeats, which all take the same steps, the first speaks for its trial.
                known = job.number in self.trials and job.repeat == 0
                stop = known and self.study.report(job.number, self.sign * value, step)
                self.places.answer(job, stop)
            case At(job, text):
                self.board.at(job, text)
            case Ended(job, outcome):
                self.board.ended(job)
                self.end(job, outcome)

    def end(self, job: Job, outcome: Outcome) -> None:
        """Record the end of a run; one that was killed starts again."""
        if outcome.state == "interrupted" or job.number not in self.trials:
            return
        tried = self.retries.get(job.subdir, 0)
        if outcome.reason in RETRIED and tried < self.settings.max_retries:
            self.retries[job.subdir] = tried + 1
            self.study.set_attrs(job.number, retries=tried + 1)
            log.warning("#%s %s (%s); again", job.subdir, outcome.reason, outcome.message)
            self.queue.appendleft(replace(job, stopping=None, deadline=float("inf")))
            return
        self.keep(job, outcome)
        self.go_on(self.trials[job.number])

    def conclude(self, trial: Trial) -> None:
        """Record the end of a trial."""
        outcomes = self.outcomes.pop(trial.number)
        seconds = console.cost(self.study.folder, outcomes)
        if seconds is None:
            seconds = time.monotonic() - trial.begun
        runs = [each for each in outcomes.values() if each is not None]
        runs += [Outcome("pruned")] if trial.pruned else []
        over = console.excess(self.study.folder, outcomes, self.settings.constraints)
        if unknown := [name for name, value in over.items() if math.isnan(value)]:
            why = f"{unknown[0]}, which search.constraints bounds, is no number"
            runs += [Outcome("failed", None, NotFinite.reason, why)]
        ended = self.study.tell(trial, runs, over, seconds=seconds)
        del self.trials[trial.number], self.left[trial.number]
        self.board.concluded(trial, ended, seconds)

    def stop(self, signum: int) -> bool:
        """Let every trial save and end; those under way go on with the next start.

        Returns False when there is nothing to wait for.
        """
        again, self.stopped = self.stopped is not None, signum
        return not again and self.places.stop()


@contextmanager
def signals(controller: Controller) -> Iterator[None]:
    """Turn SIGINT, SIGTERM, SIGUSR1 into the orderly end of a sweep; a second does not wait."""

    def handle(signum: int, _: FrameType | None) -> None:
        if not controller.stop(signum):
            raise Interrupted(signum, "sweep stopped; the same command goes on with what is left")

    before = {each: signal.signal(each, handle) for each in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
