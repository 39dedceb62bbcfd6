"""What a sweep says while it runs and when it ends."""

import json
import logging
import math
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text
from stagesweep.config.schema import objectives
from stagesweep.store.store import Store
from stagesweep.sweep.engine.slots import Job
from stagesweep.sweep.study.states import Outcome
from stagesweep.sweep.study.study import Study, Trial

log = logging.getLogger(__name__)


class Board:
    """Lines in the log; on a terminal also a bar for the sweep and a line for each run."""

    def __init__(self, opened: Study, config: DictConfig) -> None:
        self.study, self.names = opened, list(objectives(config.objective))
        self.began, self.done = time.monotonic(), 0
        self.bar: tqdm[Any] | None = None
        self.lines: dict[str, tqdm[Any]] = {}
        self.tried: dict[int, str] = {}
        self.held = ExitStack()
        if sys.stderr.isatty():
            self.held.enter_context(logging_redirect_tqdm())  # log lines go above the bars
            ended = [trial for trial in opened.trials() if trial.state.is_finished()]
            self.bar = tqdm(total=opened.total, initial=len(ended), desc="trials", position=0)

    def started(self, job: Job, trial: Trial) -> None:
        """Say what a run tries."""
        log.info("#%s: %s", job.subdir, " ".join(trial.overrides))
        if self.bar is not None:
            taken = {line.pos for line in self.lines.values()}
            free = next(n for n in range(1, 1000) if -n not in taken)
            line = tqdm(bar_format="  {desc}", position=free, leave=False)
            self.lines[job.subdir] = line
            self.tried[job.number] = " ".join(trial.overrides)
            self.at(job, "begins")

    def at(self, job: Job, text: str) -> None:
        """Show how far a run is."""
        if (line := self.lines.get(job.subdir)) is not None:
            line.set_description_str(f"#{job.subdir} {text:<16} {self.tried[job.number]}")

    def ended(self, job: Job) -> None:
        """Take a run's line away."""
        if (line := self.lines.pop(job.subdir, None)) is not None:
            line.close()

    def concluded(self, trial: Trial, outcome: Outcome, seconds: float) -> None:
        """Say how a trial ended, the best so far and how long the rest will take."""
        self.done += 1
        if outcome.state == "complete":
            values = outcome.value if isinstance(outcome.value, list) else [outcome.value]
            named = zip(self.names, values, strict=True)
            how = ", ".join(f"{name} {value:.5g}" for name, value in named)
        else:
            how = " ".join(filter(None, (outcome.state, outcome.reason, outcome.message)))
        trials = self.study.trials()
        left = self.study.total - sum(each.state.is_finished() for each in trials)
        rest = left * (time.monotonic() - self.began) / self.done
        log.info(
            "#%d: %s in %.1f s%s; %d to go, about %.0f s",
            trial.number,
            how,
            seconds,
            self.best(),
            left,
            rest,
        )
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(self.best().strip(" ()"))

    def best(self) -> str:
        """The best so far, in parentheses."""
        if len(self.study.optuna.directions) > 1:
            return f" ({len(self.study.optuna.best_trials)} on the Pareto front)"
        try:
            best = self.study.optuna.best_trial
        except ValueError:
            return ""
        return f" (best {best.value:.5g}, #{best.number})"

    def close(self) -> None:
        """Take the bars away."""
        for line in (*self.lines.values(), self.bar):
            if line is not None:
                line.close()
        self.held.close()


def cost(folder: Path, runs: Iterable[str]) -> float | None:
    """Seconds that runs took; None when one did not say."""
    seconds: float | None = 0.0
    for run in runs:
        try:
            result = json.loads((folder / run / "result.json").read_text())
        except (OSError, ValueError):
            result = {}
        known = result.get("seconds") if result.get("status") != "running" else None
        seconds = None if seconds is None or known is None else seconds + known
    return seconds


def excess(folder: Path, runs: Collection[str], bounds: Mapping[str, float]) -> dict[str, float]:
    """How far the runs of a trial are above each bound, in the mean; NaN where that is not known.

    ``seconds`` is how long its stages took when they were trained, also of those that it reused.
    """
    store = Store.default()
    sums = dict.fromkeys(bounds, 0.0)
    for run in runs if bounds else ():
        try:
            result = json.loads((folder / run / "result.json").read_text())
        except (OSError, ValueError):
            result = {}
        seconds = 0.0
        for stage in result.get("stages", []):
            stored = store.entry(stage["fingerprint"]).manifest or {}
            seconds += stored.get("seconds", stage["seconds"])
        found = {**result.get("metrics", {}), "seconds": seconds}
        for name in bounds:
            value = found.get(name)
            sums[name] += math.nan if value is None else value
    return {name: total / len(runs) - bounds[name] for name, total in sums.items()}


def sum_up(config: DictConfig, opened: Study) -> None:
    """Write the tables and the report, and print what a person wants to know first."""
    from stagesweep.sweep.report import loading, page, tables

    folder = opened.folder
    if not opened.trials():
        return
    sweep = loading.read(folder, opened.optuna)
    tables.write(sweep)
    page.write_or_warn(folder)
    if not sweep.complete:
        return
    several = len(sweep.objectives) > 1
    said = "the Pareto front" if several else "the best"
    if not (front := sweep.front):
        said = "none of them keeps search.constraints"
    print(f"\n{len(sweep.complete)} of {len(sweep.trials)} trials finished; {said}:\n")
    print(tables.leaderboard(sweep))
    trials = tables.table(sweep)
    if sweep.parameters == ["seed"] and (table := tables.over_seeds(trials)) is not None:
        atomic_text(folder / "comparison.csv", table.to_csv(index=False))
        print(f"\nMean ± half the 95 % interval over {len(sweep.complete)} seeds:\n")
        print(tables.with_intervals(table))
    print(where_to_look(folder, front[0].folder if front and not several else None))


def judge(opened: Study) -> None:
    """UserError when too many trials failed, of all that the sweep had."""
    ended = [opened.outcome_of(trial.number) for trial in opened.trials()]
    failed = [each for each in ended if each is not None and each.state == "failed"]
    if ended and not any(each is not None and each.state == "complete" for each in ended):
        why = f"; the first: {failed[0].message}" if failed else ""
        raise UserError(f"none of {len(ended)} trials finished{why}")
    if len(failed) > opened.settings.max_failure_rate * len(ended):
        raise UserError(
            f"{len(failed)} of {len(ended)} trials failed, more than "
            f"search.max_failure_rate={opened.settings.max_failure_rate:g} allows; "
            f"the first: {failed[0].message}"
        )


def where_to_look(folder: Path, best: Path | None) -> str:
    """The last lines of a sweep: paths and commands to copy."""
    lines: dict[str, str | Path] = {"all trials": folder / "results_summary.csv"}
    if best is not None:
        lines["best trial"] = best
    lines |= {"report": folder / "report.html", "curves": f"tensorboard --logdir {folder}"}
    if best is not None and (figures := sorted(best.glob("stages/*/figures"))):
        lines["figures"] = figures[-1]
    return "\n" + "\n".join(f"{name:<11} {place}" for name, place in lines.items())
