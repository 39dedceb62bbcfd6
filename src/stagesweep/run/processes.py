"""A run in several processes: the main process leads it, the others take part in its fits.

The main process is the run: it alone executes the stages and writes. The other processes wait
until it sends a fit. Imports torch only inside the functions.
"""

import logging
import pickle
from contextlib import suppress
from functools import partial

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.utils import execution_whitelist
from omegaconf import DictConfig

from stagesweep.base import signals
from stagesweep.base.errors import Pruned
from stagesweep.config import register, trust
from stagesweep.parallel import launch
from stagesweep.run.runner import Objective, run_stages


def run_in_processes(cfg: DictConfig, fingerprints: dict[str, str], count: int) -> Objective:
    """Start ``count`` processes on this machine and run the stages in them."""
    work = pickle.dumps((cfg, fingerprints, HydraConfig.instance().cfg))
    return launch.launch(count, partial(lead, work), follow)


def lead(work: bytes) -> Objective:
    """Run the stages in the main process, which may be a new interpreter."""
    logging.disable(logging.NOTSET)
    register.register()
    setup_globals()
    cfg, fingerprints, hydra = pickle.loads(work)
    HydraConfig.instance().cfg = hydra
    configure_log(hydra.hydra.job_logging, hydra.hydra.verbose)
    with execution_whitelist(trust.trusted()), launch.process_group_led():
        return run_stages(cfg, fingerprints)


def follow() -> None:
    """Take part in the fits that the main process sends, until it sends no more."""
    register.register()
    logging.disable()  # the main process logs
    from stagesweep.parallel.process_group import init_process_group

    with execution_whitelist(trust.trusted()), signals.handled(), init_process_group() as group:
        context = None
        while (task := group.receive_task()) is not None:
            if context is None:
                from stagesweep.run.context import Context

                context = Context(task.cfg)
            with suppress(Pruned):
                context.follow(task)
