"""The process of a job in a slot: it communicates with the controller through a pipe.

Imports no torch.
"""

import math
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

from stagesweep.base import signals, trial
from stagesweep.base.trial import Trial
from stagesweep.sweep.engine.worker import failed, redirect_output, run_to_outcome
from stagesweep.sweep.space.compose import SweepContext

# Seconds between SIGTERM, upon which a fit saves its checkpoint, and SIGKILL.
GRACE = 15.0


class PipeTrial(Trial):
    """A trial with a pipe to its controller.

    A thread reads the pipe. If the controller dies, the thread ends this process: by SIGTERM, so
    that a fit saves its checkpoint, and after `GRACE` seconds at once.
    """

    def __init__(self, connection: "Connection[Any, Any]", prune_on: str | None) -> None:
        self.connection, self.prune_on = connection, prune_on
        self.stopped = False
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="controller", daemon=True).start()

    def report(
        self, stage: str, metrics: Mapping[str, float], step: int, of: int | None = None
    ) -> None:
        """Send the progress, and the metric to prune on; then wait for the controller's answer."""
        self.send("progress", f"{stage} {step}/{of}" if of else f"{stage} {step}")
        name, _, metric = (self.prune_on or "").partition("/")
        value = metrics.get(metric, math.nan)
        if name == stage and math.isfinite(value) and self.send("report", float(value), step):
            self.stopped = self._answers.get()

    def should_stop(self) -> bool:
        """The controller's answer to the latest report."""
        return self.stopped

    def send(self, *message: Any) -> bool:
        """Send a message; returns False when the controller is gone."""
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


def run_in_slot(
    connection: "Connection[Any, Any]",
    pickled: bytes,
    number: int,
    subdir: str,
    overrides: list[str],
    environment: dict[str, str],
    prune_on: str | None,
) -> None:
    """Run one job in this process, and send its outcome through the pipe."""
    # A new session: Ctrl-C reaches the controller only, which can kill all processes of a job.
    os.setsid()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as in the server, if it was spawned
    work: SweepContext = pickle.loads(pickled)
    current = PipeTrial(connection, prune_on)
    trial.set_current(current)
    try:
        redirect_output(work.folder / subdir / "trial.log")
        outcome = run_to_outcome(current, work, number, subdir, overrides)
    except (SystemExit, KeyboardInterrupt) as error:
        current.send("finished", "interrupted", None, "killed", "stopped by the controller")
        raise SystemExit(getattr(error, "code", 130)) from None
    except OSError as error:
        outcome = failed(error)
    current.send("finished", *(getattr(outcome, each.name) for each in fields(outcome)))
