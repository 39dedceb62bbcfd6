"""The slots of this machine: which trial runs where, each in a process of its own.

Processes are forked from a server that has imported torch already. A trial that crashes, is killed
or runs out of memory costs itself only.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.config.messages import explain
from stagesweep.hardware import detection
from stagesweep.sweep.engine import pipe
from stagesweep.sweep.engine.job import name_of, serve
from stagesweep.sweep.space.compose import sweep_context, with_example
from stagesweep.sweep.study.states import Outcome

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """What a slot may use: environment variables that are set before torch looks at them."""

    slot: int
    environment: dict[str, str]


@dataclass
class Job:
    """One run of a trial: where it goes (below the sweep's folder), and how it is composed."""

    number: int
    subdir: str
    overrides: list[str]
    timeout: float | None = None
    repeat: int = 0
    # Why it was told to end, in a word, and when it is ended.
    stopping: str | None = None
    deadline: float = field(default=float("inf"))


@dataclass(frozen=True)
class Report:
    """A trial's value after a step; it waits to be told whether to stop."""

    job: Job
    value: float
    step: int


@dataclass(frozen=True)
class At:
    """How far a trial is."""

    job: Job
    text: str


@dataclass(frozen=True)
class Ended:
    """The end of a job."""

    job: Job
    outcome: Outcome


Event = Report | At | Ended


def leases(slots: str | int, hardware: schema.Hardware) -> list[Lease]:
    """The slots of this machine: GPUs ``devices_per_trial`` at a time (or as many ``devices`` as a
    trial uses), or shares of the cores.

    More slots than there are GPUs for share them in turn.
    """
    processes = detection.devices(hardware)
    each, found = max(hardware.devices_per_trial, processes), detection.ids(hardware)
    cores = len(os.sched_getaffinity(0))
    natural = len(found) // each if found else cores // ((hardware.threads or 1) * processes)
    count = max(1, natural if slots == "auto" else int(slots))
    groups = [found[i : i + each] for i in range(0, len(found) - each + 1, each)] or [found]
    return [
        Lease(n, {"CUDA_VISIBLE_DEVICES": ",".join(groups[n % len(groups)])} if found else {})
        for n in range(count)
    ]


class Slots:
    """Jobs in slots: `start` what is `free`, then `wait` for what they say."""

    def __init__(
        self,
        given: Sequence[Lease],
        context: HydraContext,
        master: DictConfig,
        task: TaskFunction,
    ) -> None:
        self.leases = list(given)
        self.running: dict[int, _Process] = {}
        self._shared = context, master, name_of(task)
        self._pickled: bytes | None = None
        self.prune_on: str | None = None
        cores = len(os.sched_getaffinity(0))
        # Read by the libraries of the server, once for all trials.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(self.leases))))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [*_modules(master), "stagesweep.sweep.engine.fork_server"]
        )
        forkserver.ensure_running()  # it imports while the controller gets ready

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """What a function gives in a process of the server; UserError for what it raises."""
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_call, args=(theirs, function, given))
        process.start()
        theirs.close()
        try:
            said, returned = ours.recv()
        except EOFError as error:
            raise UserError(
                "the process that checks the sweep was ended; start it again"
            ) from error
        finally:
            process.join()
        if said is not None:
            raise UserError(said)
        return returned

    def _packed(self, overrides: list[str]) -> bytes:
        """What all jobs need, with the config of one that has these overrides: composed in the
        server, which has read the grammars. Without it each job composes its own, and says why.
        """
        try:
            packed: bytes = self.call(with_example, *self._shared, overrides)
        except UserError:
            packed = pickle.dumps(sweep_context(*self._shared))
        return packed

    @property
    def free(self) -> bool:
        """Whether there is a slot without a job."""
        return len(self.running) < len(self.leases)

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return bool(self.running)

    def start(self, job: Job) -> None:
        """Start a job in a free slot; it composes its own config there."""
        lease = next(each for each in self.leases if each.slot not in self.running)
        if self._pickled is None:  # once, and as late as the config may change
            self._pickled = self._packed(job.overrides)
        ours, theirs = self.context.Pipe()
        order = (job.number, job.subdir, job.overrides, lease.environment, self.prune_on)
        process = self.context.Process(target=serve, args=(theirs, self._pickled, *order))
        process.start()
        theirs.close()
        self.running[lease.slot] = _Process(job, process, ours)
        if job.timeout is not None:
            job.deadline = time.monotonic() + job.timeout

    def wait(self, seconds: float | None = None) -> Iterator[Event]:
        """What jobs say, as soon as one says something; nothing after so many seconds."""
        now = time.monotonic()
        due = min((each.job.deadline for each in self.running.values()), default=now)
        limits = [seconds] if seconds is not None else []
        limits += [max(due - now, 0.0)] if due < float("inf") else []
        sources = {s: slot for slot, each in self.running.items() for s in each.sources()}
        ready = connection.wait(list(sources), min(limits, default=None))
        for slot in dict.fromkeys(sources[source] for source in ready):
            process = self.running[slot]
            yield from process.messages()
            if process.process.sentinel in ready:
                del self.running[slot]
                yield Ended(process.job, process.end())
        for each in self.running.values():
            each.enforce()

    def answer(self, job: Job, stop: bool) -> None:
        """Tell a job that has reported whether to stop."""
        for each in self.running.values():
            if each.job is job:
                with suppress(OSError):
                    each.pipe.send(stop)

    def stop(self, number: int | None = None) -> bool:
        """Tell every job, or those of a trial, to save and end."""
        for each in self.running.values():
            if number in (None, each.job.number):
                each.stop("interrupted")
        return True


class _Process:
    """A job's process, seen from the controller."""

    def __init__(self, job: Job, process: Any, pipe: "connection.Connection[Any, Any]") -> None:
        self.job, self.process, self.pipe = job, process, pipe
        self.outcome: Outcome | None = None
        self.open = True
        self.kills = oom_kills()

    def sources(self) -> list[Any]:
        return [self.process.sentinel, *([self.pipe] if self.open else [])]

    def messages(self) -> Iterator[Event]:
        """What has arrived."""
        try:
            while self.open and self.pipe.poll():
                match self.pipe.recv():
                    case ("report", value, step):
                        yield Report(self.job, value, step)
                    case ("at", text):
                        yield At(self.job, text)
                    case ("end", *fields):
                        self.outcome = Outcome(*fields)
        except (EOFError, OSError):
            self.open = False

    def enforce(self) -> None:
        """End what is past its time."""
        if time.monotonic() >= self.job.deadline:
            if self.job.stopping is None:
                self.stop("timeout")
            else:
                self.signal(signal.SIGKILL)
                self.job.deadline = float("inf")

    def stop(self, why: str) -> None:
        """Tell it to save and end; it is killed when it takes too long."""
        if self.job.stopping is None:
            self.job.stopping = why
            self.job.deadline = time.monotonic() + pipe.GRACE
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)

    def signal(self, signum: int) -> None:
        """Send a signal to the process and to all that it has started."""
        for send in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                send(self.process.pid, signum)

    def end(self) -> Outcome:
        """Clear away what is left of it, and say how it ended."""
        status = self.process.exitcode
        # Its own children; and itself, if what has ended is the server that watched it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.pipe.close()
        self.process.close()
        if self.outcome is not None and self.outcome.state in ("complete", "pruned"):
            return self.outcome
        if self.job.stopping == "timeout":
            return Outcome("failed", None, "timeout", f"ran longer than {self.job.timeout:g} s")
        if self.job.stopping is not None:
            return Outcome("interrupted")
        if self.outcome is not None:
            return self.outcome
        if oom_kills() > self.kills:
            return Outcome("failed", None, "oom", "killed: this machine ran out of memory")
        why = signal.Signals(-status).name if status < 0 else f"status {status}"
        return Outcome("failed", None, "killed", f"its process was ended by {why}")


def oom_kills() -> int:
    """How often the kernel has killed a process of this control group for its memory."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/sys/fs/cgroup/memory.events").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("oom_kill ")))
    return 0


def _call(
    pipe: "connection.Connection[Any, Any]", function: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's
    try:
        returned = function(*given)
    except Exception as error:
        if (said := explain(error)) is None:
            log.exception("failed")
        pipe.send((said or f"{type(error).__name__}: {error}", None))
    else:
        pipe.send((None, returned))


def _modules(master: DictConfig) -> list[str]:
    """The modules that each trial would import: those of the package that the config names, and
    what the first optimizer of a process brings.
    """
    from stagesweep.base.compat import OPTIMIZER_IMPORTS
    from stagesweep.config.nodes import target_names

    parts = OmegaConf.masked_copy(master, ["model", "data", "loss", "stage"])
    found = target_names(OmegaConf.to_container(parts, resolve=False))
    own = {t.rpartition(".")[0] for t in found if t.startswith("stagesweep.")}
    return sorted(own | ({OPTIMIZER_IMPORTS} if "stagesweep.stage.fit" in own else set()))
