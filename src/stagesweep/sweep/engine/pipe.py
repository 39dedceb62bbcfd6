"""A trial's side of its pipe to the controller of the sweep. Imports no torch."""

import math
import os
import queue
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from stagesweep.base import signals
from stagesweep.base.trial import Trial, set_current

# Between being told to end (SIGTERM: save a checkpoint) and being ended.
GRACE = 15.0


class Child(Trial):
    """The trial that this process runs.

    A thread reads the pipe. When the controller is gone it ends this process: by SIGTERM, so that
    a fit saves its checkpoint, and after `GRACE` seconds at once.
    """

    def __init__(self, connection: "Connection[Any, Any]", prune_on: str | None) -> None:
        self.connection, self.prune_on = connection, prune_on
        self.stopped = False
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="controller", daemon=True).start()

    def report(
        self, stage: str, metrics: Mapping[str, float], step: int, of: int | None = None
    ) -> None:
        """Tell the controller; with a pruner, wait for what it decides."""
        self.say("at", f"{stage} {step}/{of}" if of else f"{stage} {step}")
        name, _, metric = (self.prune_on or "").partition("/")
        value = metrics.get(metric, math.nan)
        if name == stage and math.isfinite(value) and self.say("report", float(value), step):
            self.stopped = self._answers.get()

    def should_stop(self) -> bool:
        """What the controller decided on the latest report."""
        return self.stopped

    def say(self, *message: Any) -> bool:
        """Send a message; whether the controller is there to read it."""
        try:
            self.connection.send(message)
        except OSError:
            return False
        return True

    def _listen(self) -> None:
        try:
            while True:
                self._answers.put(bool(self.connection.recv()))
        except (EOFError, OSError):
            self._answers.put(False)
            if not signals.pending():  # a second signal would leave no time to save
                os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(GRACE)
            os._exit(143)


def attach(connection: "Connection[Any, Any]", prune_on: str | None) -> Child:
    """Make this process a trial of the controller at the other end."""
    child = Child(connection, prune_on)
    set_current(child)
    return child
