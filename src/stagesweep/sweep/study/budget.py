"""The running time of a sweep, over all its starts and controllers."""

import os
import socket
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Study

# Seconds between two records. A sweep that is killed loses at most the time since the last one.
RECORD_INTERVAL = 10.0

_PREFIX = "session:"


class SweepTimer:
    """Measures the time with running trials, and records it as an attribute of the study."""

    def __init__(self, study: "Study") -> None:
        self.study = study
        self.earlier = recorded_sessions(study.user_attrs)
        self.started: float | None = None
        self.recorded = 0.0

    def tick(self, *, last: bool = False) -> None:
        """Note that trials are running. ``last`` records the time in any case."""
        now = time.time()
        if self.started is None:
            if last:
                return
            self.started = now
        if last or now - self.recorded >= RECORD_INTERVAL:
            key = f"{_PREFIX}{socket.gethostname()}:{os.getpid()}:{self.started:.0f}"
            self.study.set_user_attr(key, [self.started, now])
            self.recorded = now

    @property
    def elapsed(self) -> float:
        """Seconds with running trials, including earlier sessions."""
        own = [(self.started, time.time())] if self.started is not None else []
        return total_seconds([*self.earlier, *own])


def recorded_sessions(attributes: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The start and end of each controller's session, from the attributes of a study."""
    found = [value for key, value in attributes.items() if key.startswith(_PREFIX)]
    return [(float(start), float(end)) for start, end in found]


def total_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of some time spans, in seconds."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total
