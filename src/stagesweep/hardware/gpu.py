"""Whether there can be a GPU, told without torch, whose import alone takes seconds."""

import os
from pathlib import Path

from stagesweep.config import Device, Hardware, Precision

# Device files of a driver: NVIDIA (on Jetson, nvmap), Windows' Linux subsystem, ROCm.
FILES = ("nvidia*", "nvmap", "dxg", "kfd")


def may_be_there() -> bool:
    """Whether a driver has left a device file; without one, no GPU is used."""
    return any(True for pattern in FILES for _ in Path("/dev").glob(pattern))


def ids(settings: Hardware) -> list[str]:
    """The GPUs that runs may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if settings.device is Device.cpu or not may_be_there():
        return []
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def precision(settings: Hardware) -> Precision:
    """The number format that the machine will have; asks torch only where it must.

    UserError for a profile that this machine cannot follow, as far as that is looked at.
    """
    if settings.device is not Device.cuda and settings.precision is not Precision.fp16:
        if settings.precision is not Precision.auto:
            return settings.precision
        if settings.device is Device.cpu or not may_be_there():
            return Precision.fp32
    from stagesweep.hardware.machine import choose

    return choose(settings)[1]
