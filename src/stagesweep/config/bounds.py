"""Bounds of numbers, which a dataclass states by `schema.bounded`."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from stagesweep.base.errors import UserError


def check_bounds(path: str, value: Any, bounds: Mapping[str, Any]) -> None:
    """Raise UserError if a value, or a value in its list or mapping, breaks one of the bounds."""
    if isinstance(value, Mapping):
        values: Iterable[Any] = value.values()
    else:
        values = [value] if isinstance(value, str) or not isinstance(value, Iterable) else value
    for each in values:
        if broken := broken_bound(each, bounds):
            raise UserError(f"{path}={each}: {broken}")


def broken_bound(value: Any, bounds: Mapping[str, Any]) -> str | None:
    """What a value must be, if it breaks one of its bounds; else None."""
    if isinstance(value, str) and (literal := bounds.get("literal")):
        return None if value == literal else f"must be a number or {literal}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return "must be finite"
    if value < bounds.get("ge", -math.inf):
        return f"must be at least {bounds['ge']}"
    if value <= bounds.get("gt", -math.inf):
        return f"must be above {bounds['gt']}"
    if value >= bounds.get("lt", math.inf):
        return f"must be below {bounds['lt']}"
    return None
