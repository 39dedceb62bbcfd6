"""One job of a sweep in the process that runs it, from its order to its end."""

import fcntl
import logging
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext
from functools import reduce
from importlib import import_module
from multiprocessing import connection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime, configure_log, env_override, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from hydra.utils import execution_whitelist
from omegaconf import DictConfig, OmegaConf, open_dict

from stagesweep.base.errors import reason
from stagesweep.base.trial import Trial
from stagesweep.config.messages import explain
from stagesweep.config.nodes import copy_config
from stagesweep.sweep.engine.pipe import attach
from stagesweep.sweep.space.compose import SweepContext, compose
from stagesweep.sweep.study.states import Outcome

log = logging.getLogger(__name__)


def serve(
    pipe: "connection.Connection[Any, Any]",
    pickled: bytes,
    number: int,
    subdir: str,
    overrides: list[str],
    environment: dict[str, str],
    prune_on: str | None,
) -> None:
    """Run one job in this process, and say through the pipe how it ended."""
    os.setsid()  # Ctrl-C is the controller's; and what this starts can be ended with it
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work: SweepContext = pickle.loads(pickled)
    write_to(work.folder / subdir / "trial.log")
    child = attach(pipe, prune_on)
    try:
        outcome = run_to_end(child, work, number, subdir, overrides)
    except (SystemExit, KeyboardInterrupt) as error:
        child.say("end", "interrupted", None, "killed", "it was told to end")
        raise SystemExit(getattr(error, "code", 130)) from None
    child.say("end", outcome.state, outcome.value, outcome.reason, outcome.message)


def run_to_end(
    child: Trial, work: SweepContext, number: int, subdir: str, overrides: Sequence[str]
) -> Outcome:
    """`run` a job, and say how it ended; what tells this process to end is raised."""
    try:
        returned = run(work, number, subdir, overrides)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        line = explain(error)
        if line is None:
            log.exception("failed")
        said = line or f"{type(error).__name__}: {error}"
        return Outcome("failed", None, reason(error), said.splitlines()[0])
    if returned is None and child.should_stop():
        return Outcome("pruned")
    return Outcome("complete", returned)


def run(work: SweepContext, number: int, subdir: str, overrides: Sequence[str]) -> Any:
    """Compose the config of a job and run it as Hydra's launchers do; returns the objective."""
    setup_globals()
    composed = compose(work, overrides)
    with open_dict(composed):
        composed.hydra.job.id = str(number)
        composed.hydra.job.num = number
        composed.hydra.sweep.subdir = subdir
    JobRuntime.instance().set("name", composed.hydra.job.name)
    task, callbacks = find(work.task), work.context.callbacks
    if callbacks is None or not callbacks.callbacks:
        return execute(task, composed, work.context)
    return run_job(
        hydra_context=work.context,
        task_function=task,
        config=composed,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    ).return_value


def execute(task: TaskFunction, composed: DictConfig, context: HydraContext) -> Any:
    """What Hydra's `run_job` does where there are no callbacks, with one copy of the config where
    that makes five, which take longer than all else of it.
    """
    HydraConfig.instance().cfg = composed  # type: ignore[assignment]
    hydra = composed.hydra
    folder = Path(os.path.abspath(Path(hydra.sweep.dir, hydra.sweep.subdir)))  # noqa: PTH100 as is
    with open_dict(hydra):
        hydra.runtime.output_dir = str(folder)
    OmegaConf.resolve(hydra.job.env_set)
    OmegaConf.set_readonly(hydra, True)
    given = copy_config(composed)
    with open_dict(given):
        del given["hydra"]
    folder.mkdir(parents=True, exist_ok=True)
    with (
        execution_whitelist(context.execution_whitelist, reset=True),
        chdir(folder) if hydra.job.chdir else nullcontext(),
        env_override(hydra.job.env_set),
    ):
        configure_log(hydra.job_logging, hydra.verbose, context.execution_whitelist)
        if hydra.output_subdir is not None:
            write_down(composed, folder / hydra.output_subdir)
        try:
            return task(given)
        except Exception:
            to_files("Job failed")
            raise
        finally:
            flush()


def write_down(composed: DictConfig, folder: Path) -> None:
    """Write what a job was composed of, in the files that Hydra writes."""
    folder.mkdir(exist_ok=True)
    # The keys of a mapping begin where a line is not indented, and is no item of a list.
    parts = re.split(r"^(?!\s|- |-$)", OmegaConf.to_yaml(composed), flags=re.MULTILINE)
    hydra = [part for part in parts if part.startswith("hydra:")]
    (folder / "config.yaml").write_text("".join(part for part in parts if part not in hydra))
    (folder / "hydra.yaml").write_text("".join(hydra))
    (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(composed.hydra.overrides.task))


def to_files(message: str) -> None:
    """Log the current exception, but not where its one line will be."""
    given = log.name, logging.ERROR, __file__, 0, message, (), sys.exc_info()
    record = log.makeRecord(*given)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def flush() -> None:
    """Write out what handlers hold back."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def write_to(file: Path) -> None:
    """Send what this process prints to a file, once no other process does.

    One that an earlier controller left behind is still saving its checkpoint.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for standard in (sys.stdout, sys.stderr):
        standard.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def name_of(task: TaskFunction) -> tuple[str, str]:
    """Where another process finds the task."""
    return task.__module__, task.__qualname__


def find(name: tuple[str, str]) -> TaskFunction:
    """The task of that name, below what ``hydra.main`` put around it."""
    found: Any = reduce(getattr, name[1].split("."), import_module(name[0]))
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    task: Callable[[Any], Any] = found
    return task
