"""Ctrl-C, SIGTERM and SIGUSR1: a fit finishes its step and saves; everything else stops at once.

SIGUSR1 is what Slurm can send some time before it ends a job.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from stagesweep.base.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_deferred = False
_pending: int | None = None


def stop(signum: int) -> Interrupted:
    """The error of a run that this signal ends."""
    name = signal.Signals(signum).name
    return Interrupted(signum, f"stopped by {name}; the same command goes on from here")


def _handle(signum: int, frame: FrameType | None) -> None:
    global _pending
    if _deferred and _pending is None:
        _pending = signum
    else:  # nothing to save, or a second signal: do not wait
        raise stop(signum)


@contextmanager
def handled() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into `Interrupted` for the length of a run."""
    global _pending
    before = {s: signal.signal(s, _handle) for s in SIGNALS}
    try:
        yield
    finally:
        _pending = None
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold a signal back until `pending` is asked, or to the end of the block."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if (error := pending()) is not None:
        raise error


def pending() -> Interrupted | None:
    """The error to raise, after saving, if a signal has come."""
    return None if _pending is None else stop(_pending)


def told() -> int:
    """The signal that has come, 0 when none has."""
    return _pending or 0
