"""The controller of a sweep: proposes trials, starts their jobs and records how they end.

It is the only writer of the study. Jobs report to it, and it tells them whether to stop.
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
from omegaconf import DictConfig

from stagesweep.base.errors import (
    EnvironmentFailure,
    FailedTrials,
    Interrupted,
    NotFinite,
    UserError,
)
from stagesweep.base.signals import SIGNALS
from stagesweep.config.schema import Search, objectives
from stagesweep.sweep.engine import setup, shared_settings, summary
from stagesweep.sweep.engine.backends import Backend, open_backend
from stagesweep.sweep.engine.console import Console
from stagesweep.sweep.engine.job import Finished, Job, JobEvent, Progress, Report
from stagesweep.sweep.engine.trial_results import constraint_violations, total_seconds
from stagesweep.sweep.study import manifest
from stagesweep.sweep.study.budget import RECORD_INTERVAL, SweepTimer
from stagesweep.sweep.study.controllers import Coordinator, storage_errors
from stagesweep.sweep.study.states import Outcome, check_objective, read_outcome
from stagesweep.sweep.study.study import Study, Trial

log = logging.getLogger(__name__)

# A job that failed for one of these reasons may succeed when it is run again.
RETRIED = ("killed", "oom")


def sweep(
    config: DictConfig, sweeper: DictConfig, launcher: Launcher, arguments: Sequence[str]
) -> None:
    """Run a sweep, or continue it; UserError if no trial could run with this config."""
    typed = setup.share_settings(config, launcher, arguments)
    settings = setup.search_settings(config)
    space, points = setup.search_space(config, sweeper, settings, arguments)
    shared_settings.share(config, space, launcher, done=typed)
    modes = objectives(config.objective)
    pruner = setup.make_pruner(settings, list(modes))
    about = manifest.about(space, config)
    coordinator = Coordinator(sweeper.storage)
    with storage_errors(sweeper.storage), ExitStack() as stack:
        with coordinator.lock():
            folder, resumed = setup.choose_folder(config, sweeper, space, about)
            backend = None if resumed else open_backend(launcher)
            if backend is not None:  # a resumed sweep was validated when it began
                setup.validate_sweep(config, space, launcher, backend)
            folder.mkdir(parents=True, exist_ok=True)
            if coordinator.shared:
                setup.remove_password(config, coordinator.url)
            else:
                stack.enter_context(setup.folder_lock(folder))
            setup.write_manifest(folder, sweeper, arguments, about)
            coordinator.url = sweeper.storage
            study = Study(
                folder, sweeper, settings, space, points, pruner, list(modes.values()), coordinator
            )
        with summary.written(study):
            if not study.finished:
                backend = backend or open_backend(launcher)
                backend.prune_on = setup.pruning_metric(pruner, settings, next(iter(modes)))
                Controller(study, backend, config, settings).run()
    summary.check_failures(study)


class Controller:
    """Runs the trials of a study on a backend."""

    def __init__(
        self, study: Study, backend: Backend, config: DictConfig, settings: Search
    ) -> None:
        self.study, self.backend, self.config, self.settings = study, backend, config, settings
        self.queue = deque[Job]()
        # Running trials by number.
        self.trials: dict[int, Trial] = {}
        # For each of them: outcomes by the job's folder, None until it has finished; and the jobs
        # that are not in the queue yet.
        self.outcomes: dict[int, dict[str, Outcome | None]] = {}
        self.pending: dict[int, deque[Job]] = {}
        # Repeats run one after another if a pruner may skip the later ones.
        self.repeats_in_turn = study.pruner is not None and settings.repeats > 1
        self.prune_by_repeats = self.repeats_in_turn and backend.prune_on is None
        self.retries: dict[str, int] = {}
        self.timer = SweepTimer(study.optuna)
        self.out_of_time = False
        self.stop_signal: int | None = None
        # Why the sweep ends early, other than by a signal.
        self.stop_error: UserError | None = None
        # The pruner compares values by the mode of the objective. The sign of a metric with the
        # other mode is flipped.
        mode = next(iter(objectives(config.objective).values()))
        self.sign = 1.0 if settings.prune_mode in (None, mode) else -1.0
        self.console = Console(study, config)

    def run(self) -> None:
        """Run until every trial has finished; Interrupted if a signal stopped the sweep."""
        try:
            with handle_signals(self), self.study.coordinator.heartbeat(self.study.optuna):
                self.loop()
        finally:
            self.console.close()
        if self.stop_signal is not None:
            name = signal.Signals(self.stop_signal).name
            raise Interrupted(
                self.stop_signal,
                f"sweep stopped by {name}; run the same command to resume",
            )
        if self.stop_error is not None:
            raise self.stop_error

    @property
    def stopping(self) -> bool:
        """Whether the sweep ends early, and no more jobs start."""
        return self.stop_signal is not None or self.stop_error is not None

    def loop(self) -> None:
        """Start jobs and handle their events, until nothing is left."""
        if (
            not self.study.coordinator.shared
        ):  # several controllers take unfinished trials one by one
            for trial in self.study.unfinished():
                self.start_trial(trial)
        self.check_repeated_failure()
        try:
            while True:
                self.fill_backend()
                if not self.trials and not self.waits_for_others():
                    return
                self.timer.tick()
                for event in self.backend.wait(
                    self.study.coordinator.poll_interval or RECORD_INTERVAL
                ):
                    self.handle(event)
                self.drop_lost_trials()
                if self.stopping and not self.backend.busy:
                    return
        finally:
            self.timer.tick(last=True)

    def waits_for_others(self) -> bool:
        """Whether another controller runs trials, which this one takes over if that one dies."""
        if not self.study.coordinator.shared or self.stopping or self.out_of_time:
            return False
        return bool(self.study.running())

    def drop_lost_trials(self) -> None:
        """Stop the trials that another controller has taken over from this one."""
        if not self.study.coordinator.missed_heartbeat.is_set():
            return
        self.study.coordinator.missed_heartbeat.clear()
        for number in set(self.study.taken_over()) & self.trials.keys():
            log.warning(
                "#%d was taken over by another controller while this one was suspended", number
            )
            self.queue = deque(job for job in self.queue if job.number != number)
            self.backend.stop(number)
            del self.trials[number], self.outcomes[number], self.pending[number]

    def fill_backend(self) -> None:
        """Start queued jobs, and new trials, while the backend has room."""
        while not self.stopping and self.backend.free:
            if self.queue:
                self.start_job(self.queue.popleft())
            elif self.is_budget_spent() or (trial := self.study.ask()) is None:
                return
            else:
                self.start_trial(trial)

    def is_budget_spent(self) -> bool:
        """Whether ``search.budget`` is spent, so that no more trials start."""
        budget, spent = self.settings.budget, self.timer.elapsed
        over = budget is not None and spent > budget
        if over and not self.out_of_time:
            log.info(
                "search.budget=%g s is spent (%.0f s): no more trials start (%d of %d started)",
                budget,
                spent,
                len(self.study.trials()),
                self.study.total,
            )
        self.out_of_time = over
        return over

    def start_trial(self, trial: Trial) -> None:
        """Queue the jobs of a trial. A repeated point gets the outcome of the first one instead."""
        if (first := self.study.first(trial)) != trial.number:
            log.info("#%d repeats #%d and is skipped", trial.number, first)
            if (known := self.study.outcome_of(first)) is not None:
                self.study.tell(Trial(first, trial.overrides), [known])
            return
        trial.begun = time.monotonic()
        self.trials[trial.number] = trial
        jobs = self.jobs(trial)
        self.outcomes[trial.number] = {job.subdir: None for job in jobs}
        self.pending[trial.number] = deque(jobs)
        self.continue_trial(trial)

    def jobs(self, trial: Trial) -> list[Job]:
        """The jobs of a trial: one, or one for each repeat."""
        timeout, number = self.settings.timeout, trial.number
        lines = self.study.space.arguments(trial.overrides)
        if self.settings.repeats == 1:
            return [Job(number, str(number), lines, timeout)]
        first = int(self.config.seed)
        seeds = [f"seed={first + n}" for n in range(self.settings.repeats)]
        lines = [each for each in lines if not each.startswith("seed=")]
        return [
            Job(number, f"{number}/{n}", [*lines, seed], timeout, n) for n, seed in enumerate(seeds)
        ]

    def continue_trial(self, trial: Trial) -> None:
        """Queue the pending jobs of a trial, or the next one; finish it when all have finished."""
        pending = self.pending[trial.number]
        while pending:
            job = pending.popleft()
            if (outcome := read_outcome(self.study.folder / job.subdir)) is not None:
                self.record_outcome(job, outcome)
                continue
            self.queue.append(job)
            if self.repeats_in_turn:
                break
        if None not in self.outcomes[trial.number].values():
            self.finish_trial(trial)

    def record_outcome(self, job: Job, outcome: Outcome) -> None:
        """Keep the outcome of a job; drop the pending jobs if it decides the trial."""
        outcomes, pending = self.outcomes[job.number], self.pending[job.number]
        outcomes[job.subdir] = outcome = check_objective(outcome)
        decided = outcome.state != "complete"
        if self.prune_by_repeats and not decided:
            decided = self.study.report(job.number, outcome.value, job.repeat)
            self.trials[job.number].pruned = decided and bool(pending)
        if decided:
            for skipped in pending:
                del outcomes[skipped.subdir]
            pending.clear()

    def start_job(self, job: Job) -> None:
        """Start a job on the backend."""
        self.console.job_started(job, self.trials[job.number])
        self.backend.start(job)

    def handle(self, event: JobEvent) -> None:
        """Handle an event of a job."""
        match event:
            case Report(job, value, step):
                # All repeats report the same steps. Only the first decides about pruning.
                counts = job.number in self.trials and job.repeat == 0
                stop = counts and self.study.report(job.number, self.sign * value, step)
                self.backend.answer(job, stop)
            case Progress(job, text):
                self.console.job_progress(job, text)
            case Finished(job, outcome):
                self.console.job_finished(job)
                self.finish_job(job, outcome)

    def finish_job(self, job: Job, outcome: Outcome) -> None:
        """Record the outcome of a job, or queue the job again if the reason is worth a retry."""
        if outcome.state == "interrupted" or job.number not in self.trials:
            return
        if outcome.missing is not None and self.study.has_found(outcome.missing):
            outcome = replace(outcome, reason=EnvironmentFailure.reason)
        if outcome.reason == EnvironmentFailure.reason:
            # The trial stays a running one in the study, so the next start continues it.
            line = f"sweep stopped at #{job.subdir}: {outcome.message}; "
            again = "when that works again, run the same command to resume"
            self.stop_early(EnvironmentFailure(line + again))
            return
        retries = self.retries.get(job.subdir, 0)
        if outcome.reason in RETRIED and retries < self.settings.max_retries:
            self.retries[job.subdir] = retries + 1
            self.study.set_attrs(job.number, retries=retries + 1)
            log.warning("#%s %s (%s); again", job.subdir, outcome.reason, outcome.message)
            self.queue.appendleft(replace(job, stop_reason=None, deadline=float("inf")))
            return
        self.record_outcome(job, outcome)
        self.continue_trial(self.trials[job.number])

    def finish_trial(self, trial: Trial) -> None:
        """Record the end of a trial in the study."""
        outcomes = self.outcomes.pop(trial.number)
        seconds = total_seconds(self.study.folder, outcomes)
        if seconds is None:
            seconds = time.monotonic() - trial.begun
        ended = [outcome for outcome in outcomes.values() if outcome is not None]
        ended += [Outcome("pruned")] if trial.pruned else []
        violations = constraint_violations(self.study.folder, outcomes, self.settings.constraints)
        if unknown := [name for name, value in violations.items() if math.isnan(value)]:
            why = f"{unknown[0]}, which search.constraints bounds, is not a number"
            ended += [Outcome("failed", None, NotFinite.reason, why)]
        outcome = self.study.tell(trial, ended, violations, seconds=seconds)
        del self.trials[trial.number], self.pending[trial.number]
        self.console.trial_finished(trial, outcome, seconds)
        if outcome.state == "failed":
            self.check_repeated_failure(outcome.text)

    def check_repeated_failure(self, text: str = "") -> None:
        """Stop the sweep if its first trials failed with the same error, whose text is given."""
        if self.stopping or self.study.finished:
            return
        count = self.settings.max_failures_in_a_row
        if (last := self.study.repeated_failure(count)) is None:
            return
        message = str(last.user_attrs.get("message", ""))
        error = text.strip() or message
        log_file = self.study.folder / str(last.number) / "trial.log"
        more = f" (its log: {log_file})" if log_file.exists() else ""
        self.stop_early(
            FailedTrials(
                f"the first {count} trials failed with the same error{more}: {error}; fix it and "
                "add search.retry_failed=true, or continue with search.max_failures_in_a_row=0"
            )
        )

    def stop_early(self, error: UserError) -> None:
        """Tell all jobs to save and exit, and end the sweep with an error."""
        if not self.stopping:
            self.stop_error = error
            self.backend.stop()

    def stop(self, signum: int) -> bool:
        """Tell all jobs to save and exit; the next start of the sweep continues their trials.

        Returns False at the second signal, or if the backend cannot reach its jobs: then nothing is
        worth waiting for.
        """
        again, self.stop_signal = self.stop_signal is not None, signum
        return not again and self.backend.stop()


@contextmanager
def handle_signals(controller: Controller) -> Iterator[None]:
    """Stop the sweep in order on SIGINT, SIGTERM and SIGUSR1, and at once on a second signal."""

    def handle(signum: int, _: FrameType | None) -> None:
        if not controller.stop(signum):
            raise Interrupted(signum, "sweep stopped; run the same command to resume")

    before = {each: signal.signal(each, handle) for each in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
