"""Signals that stop a run: Ctrl-C (SIGINT), SIGTERM, and SIGUSR1, which Slurm can send in advance.

A fit finishes its step and saves a checkpoint; everything else stops at once.
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
    """The error to raise for a signal."""
    name = signal.Signals(signum).name
    return Interrupted(signum, f"stopped by {name}; run the same command to resume")


def _handle(signum: int, frame: FrameType | None) -> None:
    global _pending
    if _deferred and _pending is None:
        _pending = signum
    else:  # there is nothing to save, or this is the second signal
        raise stop(signum)


@contextmanager
def handled() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into `Interrupted` within the block."""
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
    """Defer signals to the end of the block, which may ask for them with `pending`."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if signum := pending():
        raise stop(signum)


def pending() -> int:
    """The deferred signal, or 0."""
    return _pending or 0
