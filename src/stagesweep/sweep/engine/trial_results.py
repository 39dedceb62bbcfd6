"""Numbers of a trial that the study records: its time, and how far it exceeds its bounds.

They come from the ``result.json`` that each run of the trial has written.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from stagesweep.store.store import Store


def total_seconds(folder: Path, runs: Iterable[str]) -> float | None:
    """Sum of the seconds that runs took; None if one has not written its time.

    ``runs`` are their folders below the sweep's ``folder``.
    """
    total = 0.0
    for run in runs:
        result = _read_result(folder / run)
        seconds = result.get("seconds") if result.get("status") != "running" else None
        if seconds is None:
            return None
        total += seconds
    return total


def constraint_violations(
    folder: Path, runs: Collection[str], bounds: Mapping[str, float]
) -> dict[str, float]:
    """Mean over the runs of each metric minus its bound; NaN if a run does not have the metric.

    ``seconds`` is the time that the stages took when they were trained, reused stages included.
    """
    store = Store.default()
    sums = dict.fromkeys(bounds, 0.0)
    for run in runs if bounds else ():
        result = _read_result(folder / run)
        seconds = 0.0
        for stage in result.get("stages", []):
            stored = store.entry(stage["fingerprint"]).manifest or {}
            seconds += stored.get("seconds", stage["seconds"])
        metrics = {**result.get("metrics", {}), "seconds": seconds}
        for name in bounds:
            value = metrics.get(name)
            sums[name] += math.nan if value is None else value
    return {name: total / len(runs) - bounds[name] for name, total in sums.items()}


def _read_result(run: Path) -> dict[str, Any]:
    """The ``result.json`` of a run; empty if it is missing or damaged."""
    try:
        result: dict[str, Any] = json.loads((run / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return result
