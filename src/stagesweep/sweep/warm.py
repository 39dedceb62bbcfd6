"""What the server that trials are forked from has done once for all of them.

Nothing here may start threads or initialise CUDA: neither survives a fork.
"""

import gc
import signal
import sys

from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins

from stagesweep import cli, config, fingerprint, run, validate  # noqa: F401

Plugins.instance()
# Slurm sends it to every process of a job; the controller says who is to save and end.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
# What parsers and fingerprints remember, every trial has from the start: Hydra's grammars learn
# while they read, and code that has been hashed is not read again.
with initialize_config_dir(str(config.folder())):
    compose("config", overrides=["experiment=digits", "seed=0", "stage.joint.optimizer.lr=1e-3"])
fingerprint.keep(sorted(name for name in sys.modules if name.startswith("stagesweep.")))
# A collection in a trial leaves all this alone: it would copy the memory that they share.
gc.collect()
gc.freeze()
