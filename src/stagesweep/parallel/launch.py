"""Starts the processes of a run on this machine, or recognises those that torchrun has started.

What the processes do is given by the caller, as functions that a new interpreter can import.
Deciding how many there are (`processes_to_start`, `is_follower`) imports no torch.
"""

import logging
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from stagesweep.base import signals, trial
from stagesweep.base.compat import die_with_parent
from stagesweep.base.errors import Interrupted, Lost, UserError
from stagesweep.base.trial import Trial
from stagesweep.config import schema
from stagesweep.config.messages import explain
from stagesweep.hardware import detection

Result = TypeVar("Result")


def processes_to_start(settings: schema.Hardware) -> int:
    """Number of processes that this process has to start for its run; 1 means none.

    UserError when torchrun has started another number of them.
    """
    count = detection.device_count(settings)
    world_size, local_world_size = (
        _environment("WORLD_SIZE", 1),
        _environment("LOCAL_WORLD_SIZE", 1),
    )
    if world_size == 1:
        if settings.nodes > 1:
            raise UserError(
                f"hardware.nodes={settings.nodes}: start the command on each of them by torchrun "
                f"--nnodes={settings.nodes} --nproc-per-node={count} --rdzv-backend=c10d "
                "--rdzv-endpoint=HOST:PORT -m stagesweep"
            )
        return detection.process_count(settings)
    if settings.gpu_ids is not None:
        raise UserError("hardware.gpu_ids is not for torchrun; set CUDA_VISIBLE_DEVICES before it")
    if count not in (1, world_size, local_world_size):
        raise UserError(
            f"hardware.devices={count}, but torchrun has started {world_size} processes; "
            "leave it out"
        )
    nodes = world_size // local_world_size
    if settings.nodes not in (1, nodes):
        raise UserError(
            f"hardware.nodes={settings.nodes}, but torchrun has started processes on {nodes}; "
            "leave it out"
        )
    return 1


def is_follower() -> bool:
    """Whether torchrun has started this process with a rank above 0."""
    return _environment("WORLD_SIZE", 0) > 1 and _environment("RANK", 0) > 0


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


@contextmanager
def process_group_led() -> Iterator[None]:
    """Join the other processes as their main process, and dismiss them at the end.

    Does nothing when this process is alone, which needs no torch to find out.
    """
    if _environment("WORLD_SIZE", 1) == 1:
        yield
        return
    from stagesweep.parallel.process_group import init_process_group

    with init_process_group() as group:
        try:
            yield
        finally:
            with suppress(Lost):
                group.send_stop()


def launch(count: int, main: Callable[[], Result], follow: Callable[[], None]) -> Result:
    """Start ``count`` processes on this machine; return what ``main`` returns.

    The process of rank 0 calls ``main``, the others call ``follow``. Both must be picklable: a
    process that is spawned imports them. The first process that fails ends all of them, and its
    error is raised here.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"stagesweep-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        # A forked process has torch imported already, but CUDA does not work in one.
        start_method="spawn" if detection.has_gpu_driver() else "fork",
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
    )
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    with tempfile.TemporaryDirectory(prefix="stagesweep-") as folder, _relay() as connection:
        logging.disable()  # torch's launcher logs a page for each error, we print one line
        try:
            launched = elastic_launch(settings, _process)
            values: Mapping[int, Result] = launched(main, follow, Path(folder), connection)
        except SignalException as error:
            raise signals.stop(error.sigval) from None
        except ChildFailedError as error:
            raise _first_error(Path(folder), error.failures) from None
        finally:
            logging.disable(logging.NOTSET)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return values[0]


# ------------------------------------------------------------------ in a process that was started


def _process(
    main: Callable[[], Result],
    follow: Callable[[], None],
    folder: Path,
    connection: "Connection[Any, Any] | None",
) -> Result | None:
    """Run one of the processes. An error is written to the folder, in a file named by rank."""
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.setpgrp()  # Ctrl-C reaches the parent process only, which passes it on
    die_with_parent(signal.SIGKILL)
    # A forked process has inherited the trial of its parent. Only the main process reports to the
    # sweep, and does so through its parent.
    trial.set_current(Trial() if connection is None else _RelayedTrial(connection))
    rank = int(os.environ["RANK"])
    try:
        if rank == 0:
            return main()
        follow()
        return None
    except BaseException as error:
        _write_error(folder / str(rank), error)
        # Skip the normal exit, which may wait for a dead process group.
        logging.shutdown()
        os._exit(1)


class _RelayedTrial(Trial):
    """The trial of the parent process, reached through a pipe."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self.connection = connection
        self.stopped = False

    def report(
        self, stage: str, metrics: Mapping[str, float], step: int, of: int | None = None
    ) -> None:
        """Report metrics, and receive whether to stop."""
        self.connection.send((stage, dict(metrics), step, of))
        self.stopped = self.connection.recv()

    def should_stop(self) -> bool:
        """Whether the last answer was to stop."""
        return self.stopped


@contextmanager
def _relay() -> Iterator["Connection[Any, Any] | None"]:
    """Pass the reports of the main process on to the sweep; gives None outside a sweep."""
    current = trial.current()
    if type(current) is Trial:
        yield None
        return
    ours, theirs = Pipe()

    def relay() -> None:
        with suppress(EOFError, OSError):
            while True:
                current.report(*ours.recv())
                ours.send(current.should_stop())

    threading.Thread(target=relay, name="reports", daemon=True).start()
    try:
        yield theirs
    finally:
        theirs.close()


def _write_error(path: Path, error: BaseException) -> None:
    """Write the error of a process, which the parent process is to raise."""
    if not isinstance(error, UserError):
        text = "".join(traceback.format_exception(error))
        message = f"process {path.name} of the run failed:\n\n{text}"
        error = UserError(line) if (line := explain(error)) else RuntimeError(message)
    path.write_bytes(pickle.dumps(error))


def _first_error(folder: Path, failures: Mapping[int, Any]) -> Exception:
    """Return the error of the process that failed first; the others fail because of it."""
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    errors: list[Exception] = [pickle.loads(path.read_bytes()) for path in files]
    for error in errors:
        if not isinstance(error, Lost | Interrupted):
            return error
    for rank, failure in failures.items():
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            return Lost(
                f"process {rank} of the run was killed by {name}; run the same command to resume "
                "from the last checkpoint"
            )
    return errors[0] if errors else Lost(f"a process of the run ended with {failures}")
