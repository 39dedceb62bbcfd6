"""Environment variables that numpy and torch read when they are imported. Imports no torch."""

import os

from stagesweep.config.schema import Hardware

# The second is the name before torch 2.9, which newer versions still read first.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def set_variables(settings: Hardware) -> None:
    """Set the variables of the profile before numpy and torch are imported; leave others as is.

    A trial is forked from a server that has imported torch. The allocator still counts there (torch
    reads it at the first use of a GPU), and the fit sets the number of threads.
    """
    if settings.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    if settings.allocator is not None:
        os.environ |= dict.fromkeys(ALLOCATOR, settings.allocator)
