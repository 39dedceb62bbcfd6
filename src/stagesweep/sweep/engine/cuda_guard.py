"""Tells whether the fork server has initialised CUDA, and which package did it.

CUDA does not work in a process that is forked after it was initialised. The server imports this
module first, so that it sees what later imports do.
"""

import os
import traceback
from contextlib import suppress
from pathlib import Path

import torch

from stagesweep.base.compat import before_cuda_initialises

# The CUDA driver opens it when it starts. NVML, which only counts and describes GPUs, does not.
DRIVER_FILE = "/dev/nvidia-uvm"
PASSED_OVER = ("torch", "importlib", "stagesweep.base.compat", __name__)

asked_by: list[str] = []


def record_package() -> None:
    """Remember the package that calls torch at this moment."""
    for frame, _ in traceback.walk_stack(None):
        name = str(frame.f_globals.get("__name__", ""))
        if not any(name == each or name.startswith(f"{each}.") for each in PASSED_OVER):
            asked_by.append(name.partition(".")[0])
            return


def initialised_by() -> str | None:
    """The package that has initialised CUDA in this process; None if CUDA is not initialised."""
    if not torch.cuda.is_initialized() and DRIVER_FILE not in open_files():
        return None
    return asked_by[0] if asked_by else "an imported package"


def open_files() -> set[str]:
    """The files that this process holds open (Linux only)."""
    found = set()
    with suppress(OSError):
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(descriptor))  # noqa: PTH115  a socket has no path
    return found


before_cuda_initialises(record_package)
