"""What the server that trials are forked from has done once for all of them.

Nothing here may start threads or initialise CUDA: neither survives a fork.
"""

import signal

from hydra.core.plugins import Plugins

from stagesweep import cli, run, validate  # noqa: F401

Plugins.instance()
# Slurm sends it to every process of a job; the controller says who is to save and end.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
