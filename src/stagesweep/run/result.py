"""The result of a run: the metrics of each stage, and ``result.json``. Imports no torch."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagesweep.base.files import atomic_text


@dataclass
class StageResult:
    """The result of one stage. ``status`` is ``ran``, ``reused`` or ``resumed``."""

    name: str
    status: str
    seconds: float
    fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)
    # Measured when the stage ran: the speed of a fit, and each out-of-memory.
    speed: dict[str, float] = field(default_factory=dict)
    oom: list[dict[str, Any]] = field(default_factory=list)


# Fields that a manifest of the store has beside the metrics.
MEASURED = ("speed", "oom")


def all_metrics(stages: Iterable[StageResult]) -> dict[str, float]:
    """The metrics of all stages, as ``<stage>/<metric>``."""
    return {f"{s.name}/{key}": value for s in stages for key, value in s.metrics.items()}


def write(folder: Path, result: dict[str, Any]) -> None:
    """Write ``result.json``. An infinite objective is the text "inf" or "-inf"."""
    if objective := result.get("objective"):
        result = {**result, "objective": with_infinity(objective)}
    atomic_text(folder / "result.json", json.dumps(without_nan(result), indent=1))


def mark_failed(folder: Path, reason: str) -> None:
    """Set the status in ``result.json`` for a run that ended before it could do so itself."""
    path = folder / "result.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    write(folder, {**before, "status": "failed", "reason": reason})


def with_infinity(objective: Any) -> Any:
    """Replace infinite values of an objective, or of several, by their texts."""
    if isinstance(objective, list):
        return [with_infinity(each) for each in objective]
    value = objective.get("value")
    infinite = isinstance(value, float) and math.isinf(value)
    return {**objective, "value": str(value)} if infinite else objective


def without_nan(value: Any) -> Any:
    """Replace NaN and infinities in nested plain values by None: JSON cannot express them."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
