"""What the server that trials are forked from has done once for all of them.

Nothing here may start threads or initialise CUDA: neither survives a fork.
"""

import gc
import signal
import sys

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf, open_dict

from stagesweep.base.compat import preload_hydra_logging
from stagesweep.config import register, validation
from stagesweep.config.nodes import hardware_settings
from stagesweep.hardware.numerics import numerics
from stagesweep.store import fingerprint, stage_inputs

# What the values of a sweep look like.
VALUES = ("1", "0.125", "-2.5e-05", "1e-3", "word", "two-words_3", "'a, b'", "null", "true")


def rehearse() -> None:
    """Read and check a config as trials do: Hydra's grammars learn while they read, and the
    signatures that a config is checked against are remembered.
    """
    with initialize_config_dir(str(register.folder())):
        given = ["experiment=digits", "seed=0", "stage.joint.optimizer.lr=1e-3"]
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


Plugins.instance()
setup_globals()
preload_hydra_logging()
# Slurm sends it to every process of a job; the controller says who is to save and end.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
# What is swept has brought what a rehearsal imports; if not, it has no use for that.
if "sklearn" in sys.modules:
    rehearse()
# It is read once for all trials, which run it as it is now.
fingerprint.freeze(sorted(name for name in sys.modules if name.startswith("stagesweep.")))
# A collection in a trial leaves all this alone: it would copy the memory that they share.
gc.collect()
gc.freeze()
