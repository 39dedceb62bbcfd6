"""A run in several processes: started here, or by torchrun.

The main process is the run: it alone walks the stages and writes. The others wait, and take part in
the fits that it hands out. What is only looked up (`wanted`) imports no torch.
"""

import logging
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.utils import execution_whitelist
from omegaconf import DictConfig

from stagesweep.base import signals, trial
from stagesweep.base.errors import Interrupted, Lost, Pruned, UserError
from stagesweep.base.trial import Trial
from stagesweep.config import register, schema, trust
from stagesweep.config.messages import explain
from stagesweep.hardware import detection

Objective = float | list[float] | None


def wanted(settings: schema.Hardware) -> int:
    """How many processes this one has to start for its run: one means none.

    UserError when torchrun has started another number of them.
    """
    count = detection.device_count(settings)
    sizes = [int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    if sizes[0] == 1:
        if settings.nodes > 1:
            raise UserError(
                f"hardware.nodes={settings.nodes}: start the command on each of them by torchrun "
                f"--nnodes={settings.nodes} --nproc-per-node={count} --rdzv-backend=c10d "
                "--rdzv-endpoint=HOST:PORT -m stagesweep"
            )
        return detection.process_count(settings)
    if settings.gpu_ids is not None:
        raise UserError("hardware.gpu_ids is not for torchrun; set CUDA_VISIBLE_DEVICES before it")
    if count not in (1, *sizes):
        raise UserError(
            f"hardware.devices={count}, but torchrun has started {sizes[0]} processes; leave it out"
        )
    if settings.nodes not in (1, sizes[0] // sizes[1]):
        raise UserError(
            f"hardware.nodes={settings.nodes}, but torchrun has started processes on "
            f"{sizes[0] // sizes[1]}; leave it out"
        )
    return 1


def follows() -> bool:
    """Whether torchrun has started this process to take part in the run of another."""
    size, rank = (int(os.environ.get(name) or 0) for name in ("WORLD_SIZE", "RANK"))
    return size > 1 and rank > 0


def start(cfg: DictConfig, keys: dict[str, str], count: int) -> Objective:
    """Execute a config, whose stages have these fingerprints, in so many processes of this machine;
    see `walk` for what is returned.

    What ends the first of them that fails ends the run: it is raised here.
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
        # A fork has imported torch already; a GPU does not work in one.
        start_method="spawn" if detection.has_gpu_driver() else "fork",
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
    )
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    with tempfile.TemporaryDirectory(prefix="stagesweep-") as folder, _relay() as connection:
        logging.disable()  # torch tells in a page what is said here in a line
        try:
            work = pickle.dumps((cfg, keys, HydraConfig.instance().cfg))
            launched = elastic_launch(settings, _process)
            values: Mapping[int, Objective] = launched(work, Path(folder), connection)
        except SignalException as error:
            raise signals.stop(error.sigval) from None
        except ChildFailedError as error:
            raise _reason(Path(folder), error.failures) from None
        finally:
            logging.disable(logging.NOTSET)
            for number, handler in before.items():
                signal.signal(number, handler)
    return values[0]


@contextmanager
def led() -> Iterator[None]:
    """Around a run: join the other processes if it has any, and let them go at its end."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:  # told without torch
        yield
        return
    from stagesweep.parallel.process_group import init_process_group

    with init_process_group() as group:
        try:
            yield
        finally:
            with suppress(Lost):
                group.send_stop()


def follow() -> None:
    """What a process does that is not the main one: take part in fits until there are no more."""
    register.register()
    logging.disable()  # the main process says it
    from stagesweep.parallel.process_group import init_process_group

    with execution_whitelist(trust.trusted()), signals.handled(), init_process_group() as group:
        run = None
        while (order := group.receive_task()) is not None:
            if run is None:
                from stagesweep.run.context import Run

                run = Run(order.cfg)
            with suppress(Pruned):
                run.follow(order)


# ------------------------------------------------------------------ in a process that was started


def _process(work: bytes, folder: Path, connection: "Connection[Any, Any] | None") -> Objective:
    """One of the processes; what it fails with is left in the folder, in a file of its rank."""
    from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.setpgrp()  # Ctrl-C is for the process that has started this one, which hands it on
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # nor does it live on without that one
    # A fork has its parent's: only the main process speaks to the sweep, and through that one.
    trial.set_current(Trial() if connection is None else _Relayed(connection))
    rank = int(os.environ["RANK"])
    try:
        if rank == 0:
            return _main(work)
        follow()
        return None
    except BaseException as error:
        _record(folder / str(rank), error)
        # One whose group is gone might wait for it on its way out.
        logging.shutdown()
        os._exit(1)


def _main(work: bytes) -> Objective:
    from stagesweep.run.runner import through

    logging.disable(logging.NOTSET)
    register.register()
    setup_globals()
    cfg, keys, hydra = pickle.loads(work)
    HydraConfig.instance().cfg = hydra
    configure_log(hydra.hydra.job_logging, hydra.hydra.verbose)
    with execution_whitelist(trust.trusted()), led():
        return through(cfg, keys)


class _Relayed(Trial):
    """The trial of the process that has started this one."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self.connection = connection
        self.stopped = False

    def report(
        self, stage: str, metrics: Mapping[str, float], step: int, of: int | None = None
    ) -> None:
        """Tell, and hear whether to stop."""
        self.connection.send((stage, dict(metrics), step, of))
        self.stopped = self.connection.recv()

    def should_stop(self) -> bool:
        """What was heard."""
        return self.stopped


@contextmanager
def _relay() -> Iterator["Connection[Any, Any] | None"]:
    """Hand on what the main process reports to the sweep; outside a sweep there is nobody."""
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


def _record(path: Path, error: BaseException) -> None:
    """Leave what a process failed with: an error to be raised by the one that started it."""
    if not isinstance(error, UserError):
        text = "".join(traceback.format_exception(error))
        said = f"process {path.name} of the run failed:\n\n{text}"
        error = UserError(line) if (line := explain(error)) else RuntimeError(said)
    path.write_bytes(pickle.dumps(error))


def _reason(folder: Path, failures: Mapping[int, Any]) -> Exception:
    """What ended the first process; the others then had to end, too."""
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    found: list[Exception] = [pickle.loads(path.read_bytes()) for path in files]
    for error in found:
        if not isinstance(error, Lost | Interrupted):
            return error
    for rank, failure in failures.items():
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            return Lost(
                f"process {rank} of the run was ended by {name}; the same command goes on from "
                "the last checkpoint"
            )
    return found[0] if found else Lost(f"a process of the run ended with {failures}")
