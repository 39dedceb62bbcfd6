"""The ``stagesweep`` command. Imports no torch, so that help and completion answer at once."""

import os
import signal
import sys
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig

from stagesweep.base.errors import Interrupted, UserError
from stagesweep.config import register, trust
from stagesweep.config.access import hardware
from stagesweep.config.messages import explain
from stagesweep.hardware import environment
from stagesweep.parallel import launch
from stagesweep.sweep.plugin import SlotsLauncher, StudySweeper

register.register()
# Entry points name these, too; a checkout that is not installed has none.
for plugin in (StudySweeper, SlotsLauncher):
    Plugins.instance().register(plugin)
TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def main() -> None:
    """Compose and execute a run, or a sweep of runs; exits with a status that tells how it went.

    1: one line on stderr names the fault (HYDRA_FULL_ERROR=1 adds the traceback); 130, 138 or 143:
    it was interrupted, and the same command goes on.
    """
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands its errors over
    try:
        if launch.follows():
            launch.follow()
        else:
            job()
    except KeyboardInterrupt:
        leave("interrupted", 130)
    except Interrupted as error:
        leave(str(error), error.exit_code)
    except Exception as error:
        line = explain(error)
        if line is None or TRACEBACK:
            raise
        leave(line)


@hydra.main(
    config_path=str(register.folder()), config_name="config", execution_whitelist=trust.trusted()
)
def job(cfg: DictConfig) -> float | list[float] | None:
    """One run in Hydra's hands; returns the value of its objective."""
    try:
        environment.set_variables(hardware(cfg))
        from stagesweep.run.runner import walk

        return walk(cfg)
    except Interrupted as error:
        leave(str(error), error.exit_code)  # not an Exception: it ends a sweep, too
    except Exception as error:
        line = explain(error)
        if line is None or TRACEBACK:
            raise
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise UserError(line) from error  # this trial's end; the sweep goes on
        leave(line)


def leave(line: str, status: int = 1) -> NoReturn:
    """Say why in one line and exit."""
    print(f"stagesweep: {line}", file=sys.stderr)
    sys.exit(status)
