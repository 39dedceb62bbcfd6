"""The ``stagesweep`` command. Imports no torch, which would slow down help and completion."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from hydra.utils import execution_whitelist
from omegaconf import DictConfig

from stagesweep.base.errors import Interrupted, UserError
from stagesweep.config import options, register, trust
from stagesweep.config.messages import explain
from stagesweep.config.nodes import hardware_settings
from stagesweep.hardware import environment
from stagesweep.parallel import launch
from stagesweep.sweep.plugin import SlotsLauncher, StudySweeper

register.register()
# For a checkout that is not installed, and so has no entry points.
for plugin in (StudySweeper, SlotsLauncher):
    Plugins.instance().register(plugin)
TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def main() -> None:
    """Compose and execute a run, or a sweep of runs.

    Exit status 1: an error, one line on stderr (HYDRA_FULL_ERROR=1 adds the traceback); 130, 138,
    143: interrupted by a signal; the same command resumes.
    """
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, stop)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    try:
        if launch.is_follower():
            from stagesweep.run.processes import follow

            follow()
        else:
            job()
    except KeyboardInterrupt:
        leave("interrupted", 130)
    except Interrupted as error:
        leave(str(error), error.exit_code)
    except Exception as error:
        if (line := explain(error)) is None or TRACEBACK:
            raise
        leave(line)


@hydra.main(
    config_path=str(register.folder()), config_name="config", execution_whitelist=trust.own()
)
def job(cfg: DictConfig) -> float | list[float] | None:
    """Execute one run, as Hydra's task function; return the value of its objective."""
    try:
        trust.check_variables(HydraConfig.get().job.env_set)
        options.check_optional_groups()
        environment.set_variables(hardware_settings(cfg))
        from stagesweep.run.execute import execute

        with execution_whitelist(trust.trusted()):
            return execute(cfg)
    except Interrupted as error:
        leave(str(error), error.exit_code)  # exits, so that a sweep ends as well
    except Exception as error:
        if (line := explain(error)) is None or TRACEBACK:
            raise
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise UserError(line) from error  # fails this trial; the sweep continues
        leave(line)


def stop(signum: int, _: FrameType | None) -> NoReturn:
    """Exit upon a signal that comes before the first stage, or after the last."""
    if launch.is_follower():  # the main process says why
        sys.exit(128 + signum)
    leave(f"stopped by {signal.Signals(signum).name}", 128 + signum)


def leave(line: str, status: int = 1) -> NoReturn:
    """Print one line and exit."""
    print(f"stagesweep: {line}", file=sys.stderr)
    sys.exit(status)
