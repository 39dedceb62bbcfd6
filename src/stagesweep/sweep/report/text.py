"""Values, numbers and names as the text of a report."""

import math
import re
from typing import Any

from markupsafe import Markup


def format_value(value: Any) -> str:
    """A value as text, numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float | None) -> str:
    """A duration with its units, such as ``3 min 05 s``."""
    if seconds is None or not math.isfinite(seconds):
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def breakable(name: str) -> Markup:
    """A name that a browser may break after a dot, a slash or an underscore."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])", name))


def format_number(value: Any, digits: int = 4) -> str:
    """A number with some digits; a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "—"
    return f"{value:.{digits}g}" if isinstance(value, float) else format_value(value)
