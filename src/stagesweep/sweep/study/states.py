"""How jobs and trials end: complete, pruned or failed, with a value or a reason."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from stagesweep.base.errors import NotFinite


@dataclass(frozen=True)
class Outcome:
    """How a job ended. ``state``: complete, pruned or failed; interrupted: it can go on."""

    state: str
    value: Any = None
    reason: str | None = None
    message: str = ""


def together(outcomes: list[Outcome]) -> Outcome:
    """The outcome of a trial, from those of its repeats."""
    checked = [valid(each) for each in outcomes]
    for each in checked:
        if each.state != "complete":
            return each
    if len(checked) == 1:
        return checked[0]
    values = [each.value for each in checked]
    if isinstance(values[0], list | tuple):
        return Outcome("complete", [fmean(column) for column in zip(*values, strict=True)])
    return Outcome("complete", fmean(values))


def valid(outcome: Outcome) -> Outcome:
    """A run that ended well without a number did not."""
    if outcome.state != "complete":
        return outcome
    value = outcome.value
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if any(not isinstance(n, int | float) for n in numbers):
        return Outcome("failed", None, "error", f"the run returned {value!r} as its objective")
    if any(math.isnan(n) for n in numbers):
        return Outcome("failed", None, NotFinite.reason, f"its objective is {value}")
    return outcome


def on_disk(folder: Path) -> Outcome | None:
    """How the run in a folder ended, by its ``result.json``; None when it did not."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    match result.get("status"):
        case "complete":
            objective = result.get("objective") or {}
            several = objective if isinstance(objective, list) else [objective]
            values = [math.nan if (v := each.get("value")) is None else v for each in several]
            return Outcome("complete", values if isinstance(objective, list) else values[0])
        case "pruned":
            return Outcome("pruned")
    return None
