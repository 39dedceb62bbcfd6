"""Warm-up that the fork server does once, before it forks trials.

The server imports this module last. It must not start threads or initialise CUDA: neither survives
a fork. If an imported package has initialised CUDA, the controller spawns the trials instead.
"""

import gc
import signal
import sys

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log, setup_globals
from omegaconf import OmegaConf, open_dict

from stagesweep.config import register, trust, validation
from stagesweep.config.nodes import hardware_settings
from stagesweep.hardware.numerics import numerics
from stagesweep.run import context, execute  # noqa: F401  each trial needs them
from stagesweep.store import fingerprint, stage_inputs
from stagesweep.sweep.engine import cuda_guard

# Examples of every kind of value in an override.
VALUES = ("1", "0.125", "-2.5e-05", "1e-3", "word", "two-words_3", "'a, b'", "null", "true")


def rehearse() -> None:
    """Compose and validate a config as a trial does.

    Hydra's parsers build their tables while they parse, and validation caches signatures. The
    profile is that of the CPU: to find out what a GPU can do initialises CUDA.
    """
    with initialize_config_dir(str(register.folder())):
        given = ["experiment=digits", "hardware=cpu", "seed=0", "stage.joint.optimizer.lr=1e-3"]
        made = compose("config", overrides=given, return_hydra_config=True)
    with open_dict(made):
        made.hydra.runtime.output_dir = "."
        HydraConfig.instance().set_config(made)
        OmegaConf.to_container(made.hydra.job_logging, resolve=True)
        del made["hydra"]
    validation.validate(made)
    stage_inputs.fingerprints(made, numerics(hardware_settings(made)))
    HydraConfig.instance().cfg = None
    OverridesParser.create().parse_overrides([f"a.b_1={value}" for value in VALUES])


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
