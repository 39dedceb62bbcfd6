"""Runs jobs in the slots of this machine, each in a process of its own.

The processes are forked from a server that has already imported torch. A job that crashes, is
killed or runs out of memory ends only itself.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from hydra.core.utils import setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from stagesweep.base.compat import OPTIMIZER_IMPORTS
from stagesweep.base.errors import UserError
from stagesweep.config import register, schema
from stagesweep.config.messages import explain
from stagesweep.config.nodes import target_names
from stagesweep.hardware import detection
from stagesweep.sweep.engine.job import Finished, Job, JobEvent, Progress, Report
from stagesweep.sweep.engine.pipe import GRACE, run_in_slot
from stagesweep.sweep.engine.worker import task_name
from stagesweep.sweep.space.compose import sweep_context, with_example
from stagesweep.sweep.study.states import Outcome

log = logging.getLogger(__name__)

# What the fork server imports first and last.
GUARD, SERVER = "stagesweep.sweep.engine.cuda_guard", "stagesweep.sweep.engine.fork_server"


@dataclass(frozen=True)
class Slot:
    """A share of this machine: the environment variables of the job that runs in it."""

    index: int
    environment: dict[str, str]


def local_slots(slots: str | int, hardware: schema.Hardware) -> list[Slot]:
    """The slots of this machine: groups of GPUs, or shares of the cores.

    A group has ``devices_per_trial`` GPUs, or ``devices`` if that is more. With more slots than
    groups, slots share GPUs in turn. UserError for too many processes on the CPU.
    """
    processes = detection.device_count(hardware)
    size, gpus = max(hardware.devices_per_trial, processes), detection.gpu_ids(hardware)
    cores = len(os.sched_getaffinity(0))
    default = len(gpus) // size if gpus else cores // ((hardware.threads or 1) * processes)
    count = max(1, default if slots == "auto" else int(slots))
    setting = f"hardware.devices={processes}" if count == 1 else f"sweep.slots={count}"
    detection.check_cores(hardware, count * processes, setting)
    groups = [gpus[i : i + size] for i in range(0, len(gpus) - size + 1, size)] or [gpus]
    return [
        Slot(n, {"CUDA_VISIBLE_DEVICES": ",".join(groups[n % len(groups)])} if gpus else {})
        for n in range(count)
    ]


class SlotBackend:
    """Runs each job in a free slot, in a process forked from a server."""

    def __init__(
        self,
        slots: Sequence[Slot],
        context: HydraContext,
        master: DictConfig,
        task: TaskFunction,
    ) -> None:
        self.slots = list(slots)
        self.running: dict[int, _JobProcess] = {}
        self.prune_on: str | None = None
        self._shared = context, master, task_name(task)
        self._pickled: bytes | None = None
        cores = len(os.sched_getaffinity(0))
        # Libraries read this when the server imports them, so it is the same for all trials.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(self.slots))))
        # `torch.cuda.is_available()` then asks NVML, which does not initialise CUDA.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        # The module of the task registers the configs that Hydra composes.
        preload = [GUARD, *_modules(master), task.__module__, SERVER]
        self._forkserver = multiprocessing.get_context("forkserver")
        self._forkserver.set_forkserver_preload(preload)
        forkserver.ensure_running()  # it imports while the controller prepares the sweep

    @cached_property
    def context(self) -> BaseContext:
        """How processes are started: forked from the server; spawned if it initialised CUDA."""
        if not detection.has_gpu_driver():
            return self._forkserver
        package = _call_in_process(self._forkserver, cuda_initialised_by)
        if package is None:
            return self._forkserver
        log.warning(
            "%s initialises CUDA when it is imported, which does not survive a fork; each trial "
            "starts a new interpreter, which takes seconds",
            package,
        )
        return multiprocessing.get_context("spawn")

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in a process as trials have; an error in it becomes a UserError."""
        return _call_in_process(self.context, function, *arguments)

    def _pickle(self, overrides: list[str]) -> bytes:
        """What all jobs share, with the composed config of one job as an example.

        The server composes it, whose parsers are warm. Without an example each job composes its
        own config and reports the error.
        """
        try:
            pickled: bytes = self.call(with_example, *self._shared, overrides)
        except UserError:
            pickled = pickle.dumps(sweep_context(*self._shared))
        return pickled

    @property
    def free(self) -> bool:
        """Whether a slot is free."""
        return len(self.running) < len(self.slots)

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return bool(self.running)

    def start(self, job: Job) -> None:
        """Start a job in a free slot; its process composes its config."""
        slot = next(each for each in self.slots if each.index not in self.running)
        if self._pickled is None:  # not earlier: until the first job the config may change
            self._pickled = self._pickle(job.overrides)
        pipe, other_end = self.context.Pipe()
        arguments = (job.number, job.subdir, job.overrides, slot.environment, self.prune_on)
        process = self.context.Process(  # type: ignore[attr-defined]
            target=run_in_slot, args=(other_end, self._pickled, *arguments)
        )
        process.start()
        other_end.close()
        self.running[slot.index] = _JobProcess(job, process, pipe)
        if job.timeout is not None:
            job.deadline = time.monotonic() + job.timeout

    def wait(self, seconds: float | None = None) -> Iterator[JobEvent]:
        """Yield the next events, and enforce deadlines; nothing after ``seconds``."""
        now = time.monotonic()
        deadline = min((each.job.deadline for each in self.running.values()), default=now)
        limits = [seconds] if seconds is not None else []
        limits += [max(deadline - now, 0.0)] if deadline < float("inf") else []
        sources = {s: slot for slot, each in self.running.items() for s in each.sources()}
        ready = connection.wait(list(sources), min(limits, default=None))
        for slot in dict.fromkeys(sources[source] for source in ready):
            process = self.running[slot]
            yield from process.messages()
            if process.process.sentinel in ready:
                del self.running[slot]
                yield Finished(process.job, process.end())
        for each in self.running.values():
            each.enforce_deadline()

    def answer(self, job: Job, stop: bool) -> None:
        """Tell a job that has reported a value whether to stop."""
        for each in self.running.values():
            if each.job is job:
                with suppress(OSError):
                    each.pipe.send(stop)

    def stop(self, number: int | None = None) -> bool:
        """Tell all jobs, or those of one trial, to save and exit."""
        for each in self.running.values():
            if number in (None, each.job.number):
                each.stop("interrupted")
        return True


class _JobProcess:
    """The controller's side of the process of a job."""

    def __init__(self, job: Job, process: Any, pipe: "connection.Connection[Any, Any]") -> None:
        self.job, self.process, self.pipe = job, process, pipe
        self.outcome: Outcome | None = None
        self.open = True
        self.oom_kills = oom_kills()

    def sources(self) -> list[Any]:
        """What `connection.wait` waits for: the end of the process, and messages."""
        return [self.process.sentinel, *([self.pipe] if self.open else [])]

    def messages(self) -> Iterator[JobEvent]:
        """Read the messages that have arrived."""
        try:
            while self.open and self.pipe.poll():
                match self.pipe.recv():
                    case ("report", value, step):
                        yield Report(self.job, value, step)
                    case ("progress", text):
                        yield Progress(self.job, text)
                    case ("finished", *fields):
                        self.outcome = Outcome(*fields)
        except (EOFError, OSError):
            self.open = False

    def enforce_deadline(self) -> None:
        """Stop the job after its timeout; kill it if it does not stop."""
        if time.monotonic() >= self.job.deadline:
            if self.job.stop_reason is None:
                self.stop("timeout")
            else:
                self.signal(signal.SIGKILL)
                self.job.deadline = float("inf")

    def stop(self, reason: str) -> None:
        """Tell the job to save and exit, within `GRACE` seconds."""
        if self.job.stop_reason is None:
            self.job.stop_reason = reason
            self.job.deadline = time.monotonic() + GRACE
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)

    def signal(self, signum: int) -> None:
        """Send a signal to the process and to all that it has started."""
        for send in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                send(self.process.pid, signum)

    def end(self) -> Outcome:
        """Clean up after the process has ended, and return the outcome of its job."""
        self.process.join()  # of a spawned process the sentinel is ready shortly before its end
        status = self.process.exitcode
        # Kill its children. If the fork server has died, the process itself may still be alive.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.pipe.close()
        self.process.close()
        if self.outcome is not None and self.outcome.state in ("complete", "pruned"):
            return self.outcome
        if self.job.stop_reason is not None:
            return self.job.outcome_when_stopped()
        if self.outcome is not None:
            return self.outcome
        if oom_kills() > self.oom_kills:
            return Outcome("failed", None, "oom", "killed: this machine ran out of memory")
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return Outcome("failed", None, "killed", f"its process was killed by {how}")


def oom_kills() -> int:
    """How many processes of this control group the kernel has killed for lack of memory."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/sys/fs/cgroup/memory.events").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("oom_kill ")))
    return 0


def cuda_initialised_by() -> str | None:
    """Run in a process of the server: the package that has initialised CUDA there, or None."""
    found: str | None = import_module(SERVER).cuda_initialised_by()
    return found


def _call_in_process(context: BaseContext, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in another process; an error in it becomes a UserError."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(  # type: ignore[attr-defined]
        target=_call, args=(sender, function, arguments)
    )
    process.start()
    sender.close()
    try:
        message, returned = receiver.recv()
    except EOFError as error:
        raise UserError(
            "the process that checks the sweep was killed; run the command again"
        ) from error
    finally:
        process.join()
    if message is not None:
        raise UserError(message)
    return returned


def _call(
    pipe: "connection.Connection[Any, Any]",
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Send the error message, or None, and the result of a function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the controller
    register.register()  # the server has done both, a process that was spawned has not
    setup_globals()
    try:
        returned = function(*arguments)
    except Exception as error:
        if (message := explain(error)) is None:
            log.exception("failed")
        pipe.send((message or f"{type(error).__name__}: {error}", None))
    else:
        pipe.send((None, returned))


def _modules(master: DictConfig) -> list[str]:
    """The modules that every trial imports: those of stagesweep that the config names.

    A fit also imports ``torch._dynamo``, with the first optimizer of a process.
    """
    parts = OmegaConf.masked_copy(master, ["model", "data", "loss", "stage"])
    found = target_names(OmegaConf.to_container(parts, resolve=False))
    own = {target.rpartition(".")[0] for target in found if target.startswith("stagesweep.")}
    return sorted(own | ({OPTIMIZER_IMPORTS} if "stagesweep.stage.fit" in own else set()))
