"""The final states of runs and trials: complete, pruned or failed, with a value or a reason."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from stagesweep.base.errors import NotFinite


@dataclass(frozen=True)
class Outcome:
    """How a run or a trial ended.

    ``state`` is complete, pruned or failed; or interrupted, when the run can continue.
    """

    state: str
    value: Any = None
    reason: str | None = None
    message: str = ""
    # The whole text of the error, of which ``message`` is the first line.
    text: str = ""
    # The file whose absence made the run fail.
    missing: str | None = None


def combine_repeats(outcomes: list[Outcome]) -> Outcome:
    """The outcome of a trial: the mean of its repeats, or the first that is not complete."""
    checked = [check_objective(each) for each in outcomes]
    for each in checked:
        if each.state != "complete":
            return each
    if len(checked) == 1:
        return checked[0]
    values = [each.value for each in checked]
    if isinstance(values[0], list | tuple):
        return Outcome("complete", [fmean(column) for column in zip(*values, strict=True)])
    return Outcome("complete", fmean(values))


def check_objective(outcome: Outcome) -> Outcome:
    """Turn a complete run whose objective is not a number into a failed one."""
    if outcome.state != "complete":
        return outcome
    value = outcome.value
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if any(not isinstance(n, int | float) for n in numbers):
        return Outcome("failed", None, "error", f"the run returned {value!r} as its objective")
    if any(math.isnan(n) for n in numbers):
        return Outcome("failed", None, NotFinite.reason, f"its objective is {value}")
    return outcome


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome of the run in a folder, from ``result.json``. None when it has not ended."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    match result.get("status"):
        case "complete":
            objective = result.get("objective") or {}
            several = objective if isinstance(objective, list) else [objective]
            values = [
                math.nan if (v := each.get("value")) is None else number(v) for each in several
            ]
            return Outcome("complete", values if isinstance(objective, list) else values[0])
        case "pruned":
            return Outcome("pruned")
    return None


def number(value: Any) -> Any:
    """The number of a value in ``result.json``: NaN is null there, and infinities are texts."""
    if value is None:
        return math.nan
    return float(value) if value in ("inf", "-inf") else value


def forget_failures(folder: Path) -> None:
    """Remove the ``result.json`` of each run of a failed trial that has to run again.

    Those are the runs without an objective, or all of them if each has one.
    """
    runs = [file.parent for file in (*folder.glob("result.json"), *folder.glob("*/result.json"))]
    outcomes = {run: read_outcome(run) for run in runs}
    good = [run for run, o in outcomes.items() if o and check_objective(o).state == "complete"]
    for run in runs:
        if run not in good or len(good) == len(runs):
            (run / "result.json").unlink(missing_ok=True)
