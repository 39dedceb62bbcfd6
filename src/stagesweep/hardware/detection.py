"""Whether there can be a GPU, told without torch, whose import alone takes seconds."""

import os
from pathlib import Path

from stagesweep.base.errors import UserError
from stagesweep.config.schema import Device, Hardware

# Device files of a driver: NVIDIA (on Jetson, nvmap), Windows' Linux subsystem, ROCm.
FILES = ("nvidia*", "nvmap", "dxg", "kfd")


def may_be_there() -> bool:
    """Whether a driver has left a device file; without one, no GPU is used."""
    return any(True for pattern in FILES for _ in Path("/dev").glob(pattern))


def devices(settings: Hardware) -> int:
    """How many devices, and so processes, a run has on this machine."""
    if settings.gpu_ids is None:
        return settings.devices
    if settings.devices not in (1, len(settings.gpu_ids)) or not settings.gpu_ids:
        raise UserError(
            f"hardware.devices={settings.devices}, but hardware.gpu_ids={settings.gpu_ids}; set one"
        )
    return len(settings.gpu_ids)


def processes(settings: Hardware) -> int:
    """How many processes a run starts on this machine: one a device.

    With ``strict`` false there are no more than there are GPUs, and one where there is none.
    """
    count = devices(settings)
    if count == 1 or settings.strict or settings.device is Device.cpu:
        return count
    return max(1, min(count, there()))


def there() -> int:
    """How many GPUs torch finds."""
    if not may_be_there():
        return 0
    import torch

    return torch.cuda.device_count()


def select(settings: Hardware) -> None:
    """Let this process, and those it starts, see no GPU but those of ``gpu_ids``."""
    if settings.gpu_ids is not None and settings.device is not Device.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids(settings))


def ids(settings: Hardware) -> list[str]:
    """The GPUs that runs may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    Of ``gpu_ids`` a trial keeps those of its slot.
    """
    if settings.device is Device.cpu or not may_be_there():
        return []
    wanted = None if settings.gpu_ids is None else [str(number) for number in settings.gpu_ids]
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        visible = [name.strip() for name in given.split(",") if name.strip()]
        return [name for name in visible if wanted is None or name in wanted]
    if wanted is not None:
        return wanted
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
