"""How long a sweep has run, over all its starts and on all machines that took part."""

import os
import socket
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Study

# The record is at most so many seconds behind, which is what a sweep that is killed forgets.
BEHIND = 10.0

_PREFIX = "session:"


class Clock:
    """The time in which this controller has trials under way, as an attribute of the study."""

    def __init__(self, study: "Study") -> None:
        self.study = study
        self.before = sessions(study.user_attrs)
        self.begun: float | None = None
        self.written = 0.0

    def tick(self, *, last: bool = False) -> None:
        """Say that a trial is under way."""
        now = time.time()
        if self.begun is None:
            if last:
                return
            self.begun = now
        if last or now - self.written >= BEHIND:
            key = f"{_PREFIX}{socket.gethostname()}:{os.getpid()}:{self.begun:.0f}"
            self.study.set_user_attr(key, [self.begun, now])
            self.written = now

    @property
    def spent(self) -> float:
        """Seconds with a trial under way, those before this controller included."""
        own = [(self.begun, time.time())] if self.begun is not None else []
        return covered([*self.before, *own])


def sessions(attributes: Mapping[str, Any]) -> list[tuple[float, float]]:
    """When controllers had trials under way, from the attributes of a study."""
    found = [value for key, value in attributes.items() if key.startswith(_PREFIX)]
    return [(float(begun), float(seen)) for begun, seen in found]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in any of some spans."""
    total, until = 0.0, float("-inf")
    for begun, ended in sorted(spans):
        total += max(ended - max(begun, until), 0.0)
        until = max(until, ended)
    return total
