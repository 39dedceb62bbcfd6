"""What libraries read from the environment when they start. Imports no torch."""

import os

from stagesweep.config.schema import Hardware

# The second name is that of torch before 2.9, which newer ones still read first.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare(settings: Hardware) -> None:
    """Set what the profile says, before numpy and torch are imported; what it leaves open stays.

    In a trial, forked from a server that has imported torch, the allocator's setting still counts
    (torch reads it at the first use of a GPU) and the number of threads is set by the fit; both
    were in the server's environment before, as the sweep's own profile says.
    """
    if settings.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    if settings.allocator is not None:
        os.environ |= dict.fromkeys(ALLOCATOR, settings.allocator)
