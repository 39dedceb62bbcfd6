"""Warm-up that the fork server does once, before it forks trials.

The server imports this module last. It must not start threads or initialise CUDA: neither survives
a fork. If an imported package has initialised CUDA, the controller spawns the trials instead.
"""

import gc
import signal
import sys

from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log, setup_globals
from omegaconf import OmegaConf

from stagesweep.config import register, trust
from stagesweep.run import context, execute  # noqa: F401  each trial needs them
from stagesweep.store import fingerprint
from stagesweep.sweep.engine import cuda_guard
from stagesweep.sweep.engine.rehearsal import rehearse

register.register()
Plugins.instance()
setup_globals()
# Changes no logger, but imports what Hydra imports when it configures logging.
nothing = OmegaConf.create({"version": 1, "incremental": True, "root": {}})
configure_log(nothing, execution_whitelist=trust.trusted())
# Slurm sends SIGUSR1 to every process of a job; the controller decides which trials save and exit.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
# A rehearsal imports modules such as scikit-learn, which not every sweep needs.
if "sklearn" in sys.modules:
    rehearse()
# Hash the source code once for all trials: they run it as it is now.
fingerprint.freeze(sorted(name for name in sys.modules if name.startswith("stagesweep.")))
CUDA_INITIALISED_BY = cuda_guard.initialised_by()
# A garbage collection in a trial must not touch these objects: it would copy the shared memory.
gc.collect()
gc.freeze()


def cuda_initialised_by() -> str | None:
    """The package that has initialised CUDA in the server; None in a server fit for forking."""
    return CUDA_INITIALISED_BY
