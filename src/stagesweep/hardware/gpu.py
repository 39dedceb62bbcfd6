"""Whether there can be a GPU, told without torch, whose import alone takes seconds."""

import os
from pathlib import Path
from typing import Any

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


def numerics(settings: Hardware) -> dict[str, Any]:
    """What of the profile changes numbers, as this machine will have it: precision and tf32.

    Asks torch only where it must. The others change nothing, or the last bits as any GPU does:
    which algorithm cuDNN picks, and what a compiler fuses. UserError for a profile that this
    machine cannot follow, as far as that is looked at.
    """
    needs_gpu = settings.device is Device.cuda or settings.precision is Precision.fp16
    if not needs_gpu and (settings.device is Device.cpu or not may_be_there()):
        auto = settings.precision is Precision.auto
        return {"precision": Precision.fp32 if auto else settings.precision, "tf32": False}
    from stagesweep.hardware.machine import choose

    chosen = choose(settings)
    return {"precision": chosen.precision, "tf32": chosen.tf32}
