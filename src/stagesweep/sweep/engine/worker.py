"""Runs one job in the current process, as Hydra's launchers do. Imports no torch."""

import fcntl
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime, configure_log, env_override, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from hydra.utils import execution_whitelist
from omegaconf import DictConfig, OmegaConf, open_dict

from stagesweep.base.errors import missing_file, reason
from stagesweep.base.trial import Trial
from stagesweep.config.messages import explain
from stagesweep.config.nodes import copy_config
from stagesweep.sweep.space.compose import SweepContext, compose
from stagesweep.sweep.study.states import Outcome

log = logging.getLogger(__name__)


def run_to_outcome(
    current: Trial, work: SweepContext, number: int, subdir: str, overrides: Sequence[str]
) -> Outcome:
    """`run_task`, with its result or its error as an outcome.

    Raises only SystemExit and KeyboardInterrupt, which end this process.
    """
    try:
        returned = run_task(work, number, subdir, overrides)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        if explain(error) is None:
            log.exception("failed")
        return failed(error)
    if returned is None and current.should_stop():
        return Outcome("pruned")
    return Outcome("complete", returned)


def failed(error: BaseException) -> Outcome:
    """The outcome of a run that raised an error."""
    text = explain(error) or f"{type(error).__name__}: {error}"
    return Outcome("failed", None, reason(error), text.splitlines()[0], text, missing_file(error))


def run_task(work: SweepContext, number: int, subdir: str, overrides: Sequence[str]) -> Any:
    """Compose the config of a job and call the task with it; returns the objective."""
    task = load_task(work.task)  # its module also registers the configs that Hydra composes
    setup_globals()
    composed = compose(work, overrides)
    with open_dict(composed):
        composed.hydra.job.id = str(number)
        composed.hydra.job.num = number
        composed.hydra.sweep.subdir = subdir
    JobRuntime.instance().set("name", composed.hydra.job.name)
    callbacks = work.context.callbacks
    if callbacks is None or not callbacks.callbacks:
        return run_without_callbacks(task, composed, work.context)
    return run_job(
        hydra_context=work.context,
        task_function=task,
        config=composed,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    ).return_value


def run_without_callbacks(task: TaskFunction, composed: DictConfig, context: HydraContext) -> Any:
    """Hydra's `run_job` for a job without callbacks.

    It copies the config once. Hydra copies it five times, which takes longer than the rest of it.
    """
    HydraConfig.instance().cfg = composed  # type: ignore[assignment]
    hydra = composed.hydra
    folder = Path(os.path.abspath(Path(hydra.sweep.dir, hydra.sweep.subdir)))  # noqa: PTH100 as is
    with open_dict(hydra):
        hydra.runtime.output_dir = str(folder)
    OmegaConf.resolve(hydra.job.env_set)
    OmegaConf.set_readonly(hydra, True)
    task_config = copy_config(composed)
    with open_dict(task_config):
        del task_config["hydra"]
    folder.mkdir(parents=True, exist_ok=True)
    with (
        execution_whitelist(context.execution_whitelist, reset=True),
        chdir(folder) if hydra.job.chdir else nullcontext(),
        env_override(hydra.job.env_set),
    ):
        configure_log(hydra.job_logging, hydra.verbose, context.execution_whitelist)
        if hydra.output_subdir is not None:
            save_config(composed, folder / hydra.output_subdir)
        try:
            return task(task_config)
        except Exception:
            log_exception_to_files("Job failed")
            raise
        finally:
            flush_log()


def save_config(composed: DictConfig, folder: Path) -> None:
    """Write the files that Hydra writes into ``.hydra``."""
    folder.mkdir(exist_ok=True)
    # Split the YAML of the whole config, which is faster than one conversion for each file. A
    # top-level key is on a line that is neither indented nor an item of a list.
    parts = re.split(r"^(?!\s|- |-$)", OmegaConf.to_yaml(composed), flags=re.MULTILINE)
    hydra = [part for part in parts if part.startswith("hydra:")]
    (folder / "config.yaml").write_text("".join(part for part in parts if part not in hydra))
    (folder / "hydra.yaml").write_text("".join(hydra))
    (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(composed.hydra.overrides.task))


def log_exception_to_files(message: str) -> None:
    """Log the current exception to log files only: the console shows it as one line."""
    fields = log.name, logging.ERROR, __file__, 0, message, (), sys.exc_info()
    record = log.makeRecord(*fields)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def flush_log() -> None:
    """Flush all handlers of the root logger."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def redirect_output(file: Path) -> None:
    """Append stdout and stderr of this process to a file.

    Waits for a lock on the file: a process that an earlier controller left behind may still be
    saving its checkpoint.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def task_name(task: TaskFunction) -> tuple[str, str]:
    """Module and qualified name of the task, by which another process imports it."""
    return task.__module__, task.__qualname__


def load_task(name: tuple[str, str]) -> TaskFunction:
    """Import the task of that name, without the decorator ``hydra.main``."""
    found: Any = reduce(getattr, name[1].split("."), import_module(name[0]))
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    task: Callable[[Any], Any] = found
    return task
