"""The progress of a sweep: log lines, and bars on a terminal."""

import logging
import sys
import time
from contextlib import ExitStack
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stagesweep.config.schema import objectives
from stagesweep.sweep.engine.job import Job
from stagesweep.sweep.study.states import Outcome
from stagesweep.sweep.study.study import Study, Trial

log = logging.getLogger(__name__)


class Console:
    """Log lines; on a terminal also a bar for the sweep, and a line for each running job."""

    def __init__(self, study: Study, config: DictConfig) -> None:
        self.study, self.objectives = study, list(objectives(config.objective))
        self.start_time, self.trials_done = time.monotonic(), 0
        self.bar: tqdm[Any] | None = None
        self.lines: dict[str, tqdm[Any]] = {}
        self.overrides: dict[int, str] = {}
        self.stack = ExitStack()
        if sys.stderr.isatty():
            self.stack.enter_context(logging_redirect_tqdm())  # log lines go above the bars
            finished = [trial for trial in study.trials() if trial.state.is_finished()]
            self.bar = tqdm(total=study.total, initial=len(finished), desc="trials", position=0)

    def job_started(self, job: Job, trial: Trial) -> None:
        """Log the overrides of a job, and open its line."""
        overrides = " ".join(trial.overrides)
        log.info("#%s: %s", job.subdir, overrides)
        if self.bar is not None:
            taken = {line.pos for line in self.lines.values()}
            free = next(n for n in range(1, 1000) if -n not in taken)
            self.lines[job.subdir] = tqdm(bar_format="  {desc}", position=free, leave=False)
            self.overrides[job.number] = overrides
            self.job_progress(job, "starting")

    def job_progress(self, job: Job, text: str) -> None:
        """Show the progress of a job in its line."""
        if (line := self.lines.get(job.subdir)) is not None:
            line.set_description_str(f"#{job.subdir} {text:<16} {self.overrides[job.number]}")

    def job_finished(self, job: Job) -> None:
        """Remove the line of a job."""
        if (line := self.lines.pop(job.subdir, None)) is not None:
            line.close()

    def trial_finished(self, trial: Trial, outcome: Outcome, seconds: float) -> None:
        """Log the outcome of a trial, the best so far, and the time that is left."""
        self.trials_done += 1
        if outcome.state == "complete":
            values = outcome.value if isinstance(outcome.value, list) else [outcome.value]
            named = zip(self.objectives, values, strict=True)
            text = ", ".join(f"{name} {value:.5g}" for name, value in named)
        else:
            text = " ".join(filter(None, (outcome.state, outcome.reason, outcome.message)))
        trials = self.study.trials()
        remaining = self.study.total - sum(each.state.is_finished() for each in trials)
        estimate = remaining * (time.monotonic() - self.start_time) / self.trials_done
        log.info(
            "#%d: %s in %.1f s%s; %d to go, about %.0f s",
            trial.number,
            text,
            seconds,
            self.best(),
            remaining,
            estimate,
        )
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(self.best().strip(" ()"))

    def best(self) -> str:
        """The best trial so far, in parentheses."""
        if len(self.study.optuna.directions) > 1:
            return f" ({len(self.study.optuna.best_trials)} on the Pareto front)"
        try:
            best = self.study.optuna.best_trial
        except ValueError:
            return ""
        return f" (best {best.value:.5g}, #{best.number})"

    def close(self) -> None:
        """Remove the bars."""
        for line in (*self.lines.values(), self.bar):
            if line is not None:
                line.close()
        self.stack.close()
