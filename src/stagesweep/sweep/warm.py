"""What the server that trials are forked from has done once for all of them.

Nothing here may start threads or initialise CUDA: neither survives a fork.
"""

from hydra.core.plugins import Plugins

from stagesweep import cli, run, validate  # noqa: F401

Plugins.instance()
