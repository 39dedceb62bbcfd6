"""The process of a job on a cluster: it communicates with the controller through files."""

import json
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from stagesweep.base import trial
from stagesweep.base.trial import Trial
from stagesweep.sweep.engine.worker import failed, redirect_output, run_to_outcome
from stagesweep.sweep.space.compose import SweepContext
from stagesweep.sweep.study.states import Outcome

# Files in the folder of a job: what it reports, and what the controller tells it.
REPORTS, COMMAND = "reports.jsonl", "order.txt"


class FileTrial(Trial):
    """A trial whose controller reads and writes files in its folder."""

    def __init__(self, folder: Path, prune_on: str | None) -> None:
        self.folder, self.prune_on = folder, prune_on
        self.stopped = False

    def report(
        self, stage: str, metrics: Mapping[str, float], step: int, of: int | None = None
    ) -> None:
        """Append a line; its value is null when the stage does not give the metric to prune on."""
        name, _, metric = (self.prune_on or "").partition("/")
        self.write(metrics.get(metric) if name == stage else None, step)

    def write(self, value: float | None, step: int) -> None:
        """Append a line to the reports; a value that is not finite is written as null."""
        finite = value if value is not None and abs(value) < float("inf") else None
        with (self.folder / REPORTS).open("a") as stream:
            stream.write(json.dumps([finite, step]) + "\n")

    def should_stop(self) -> bool:
        """Whether the controller has pruned this trial; the command "end" raises SIGTERM."""
        with suppress(FileNotFoundError):
            match (self.folder / COMMAND).read_text():
                case "prune":
                    self.stopped = True
                case "end":
                    os.kill(os.getpid(), signal.SIGTERM)
        return self.stopped


def run_on_cluster(
    environment: tuple[str, list[str], dict[str, str]],
    pickled: bytes,
    number: int,
    subdir: str,
    overrides: list[str],
    prune_on: str | None,
) -> Outcome:
    """Run one job in this process and return its outcome.

    ``environment`` is the controller's: its folder, its module search path, its variables.
    """
    folder, search_path, variables = environment
    os.chdir(folder)
    os.environ.update(variables)
    sys.path.extend(path for path in search_path if path not in sys.path)
    work: SweepContext = pickle.loads(pickled)
    job_folder = work.folder / subdir
    current = FileTrial(job_folder, prune_on)
    trial.set_current(current)
    try:
        redirect_output(job_folder / "trial.log")
        current.write(None, 0)  # the job has started
        return run_to_outcome(current, work, number, subdir, overrides)
    except (SystemExit, KeyboardInterrupt):
        return Outcome("interrupted", None, "killed", "stopped by the controller")
    except OSError as error:
        return failed(error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a full disk, which the outcome says
                stream.flush()
