"""The end of a sweep: its tables and report, its printed lines, and whether it has failed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text
from stagesweep.config.messages import explain
from stagesweep.sweep.study.study import Study

log = logging.getLogger(__name__)


def write_results(study: Study) -> None:
    """Write the tables and the report, and print the leaderboard."""
    # Not at the top: pandas and matplotlib would delay the first trial.
    from stagesweep.sweep.report import loading, page, tables

    folder = study.folder
    if not study.trials():
        return
    sweep = loading.read(folder, study.optuna)
    tables.write(sweep)
    page.write_or_warn(folder)
    if not sweep.complete:
        return
    several = len(sweep.objectives) > 1
    title = "the Pareto front" if several else "the best"
    if not (front := sweep.front):
        title = "no trial satisfies search.constraints"
    print(f"\n{len(sweep.complete)} of {len(sweep.trials)} trials finished; {title}:\n")
    print(tables.leaderboard(sweep))
    trials = tables.table(sweep)
    if sweep.parameters == ["seed"] and (table := tables.over_seeds(trials)) is not None:
        atomic_text(folder / "comparison.csv", table.to_csv(index=False))
        print(f"\nMean ± half the 95 % interval over {len(sweep.complete)} seeds:\n")
        print(tables.with_intervals(table))
    print(closing_lines(folder, front[0].folder if front and not several else None))


@contextmanager
def written(study: Study) -> Iterator[None]:
    """Write the results after the block. If the block fails, its error is the one that counts."""
    try:
        yield
    except BaseException:
        try:
            write_results(study)
        except Exception as error:
            log.warning("the tables and the report were not written: %s", explain(error) or error)
        raise
    write_results(study)


def closing_lines(folder: Path, best: Path | None) -> str:
    """The last lines that a sweep prints: paths and commands to copy."""
    lines: dict[str, str | Path] = {"all trials": folder / "results_summary.csv"}
    if best is not None:
        lines["best trial"] = best
    lines |= {"report": folder / "report.html", "curves": f"tensorboard --logdir {folder}"}
    if best is not None and (figures := sorted(best.glob("stages/*/figures"))):
        lines["figures"] = figures[-1]
    return "\n" + "\n".join(f"{name:<11} {path}" for name, path in lines.items())


def check_failures(study: Study) -> None:
    """UserError when no trial is complete, or more failed than ``search.max_failure_rate``."""
    outcomes = [study.outcome_of(trial.number) for trial in study.trials()]
    ended = [outcome for outcome in outcomes if outcome is not None]
    failed = [outcome for outcome in ended if outcome.state == "failed"]
    if outcomes and not any(outcome.state == "complete" for outcome in ended):
        why = f"; the first: {failed[0].message}" if failed else ""
        raise UserError(f"none of {len(outcomes)} trials finished{why}")
    if len(failed) > study.settings.max_failure_rate * len(outcomes):
        raise UserError(
            f"{len(failed)} of {len(outcomes)} trials failed, more than "
            f"search.max_failure_rate={study.settings.max_failure_rate:g} allows; "
            f"the first: {failed[0].message}"
        )
