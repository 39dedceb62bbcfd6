"""Detects GPUs; imports torch, which takes seconds, only where a driver is installed."""

import os
from pathlib import Path

from stagesweep.base.errors import UserError
from stagesweep.config.schema import Device, Hardware

# Device files of drivers: NVIDIA (nvmap on Jetson), Windows Subsystem for Linux, ROCm.
FILES = ("nvidia*", "nvmap", "dxg", "kfd")


def has_gpu_driver() -> bool:
    """Whether there is a device file of a GPU driver; without one, no GPU is used."""
    return any(True for pattern in FILES for _ in Path("/dev").glob(pattern))


def device_count(settings: Hardware) -> int:
    """Number of devices that a run asks for on this machine."""
    if settings.gpu_ids is None:
        return settings.devices
    if settings.devices not in (1, len(settings.gpu_ids)) or not settings.gpu_ids:
        raise UserError(
            f"hardware.devices={settings.devices}, but hardware.gpu_ids={settings.gpu_ids}; set one"
        )
    return len(settings.gpu_ids)


def process_count(settings: Hardware) -> int:
    """Number of processes that a run starts on this machine: one for each device.

    With ``strict`` false at most one for each GPU, and one when there is none. UserError for too
    many processes on the CPU.
    """
    count = device_count(settings)
    if count > 1 and not settings.strict and settings.device is not Device.cpu:
        return max(1, min(count, gpu_count()))
    check_cores(settings, count, f"hardware.devices={count}")
    return count


def check_cores(settings: Hardware, processes: int, setting: str) -> None:
    """UserError when a setting starts more than two processes for each core, and no GPU is used.

    They would share the cores, and may need more memory than there is.
    """
    cores = len(os.sched_getaffinity(0))
    if processes <= 2 * cores or not settings.strict:
        return
    if settings.device is Device.cpu or gpu_count() == 0:
        raise UserError(
            f"{setting} starts {processes} processes on a CPU with {cores} "
            f"core{'s' * (cores > 1)}; set it so that there are at most {2 * cores}, or set "
            "hardware.strict=false"
        )


def gpu_count() -> int:
    """Number of GPUs that torch finds."""
    if not has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def set_visible_gpus(settings: Hardware) -> None:
    """Show only the GPUs of ``gpu_ids`` to this process and its children."""
    if settings.gpu_ids is not None and settings.device is not Device.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu_ids(settings))


def gpu_ids(settings: Hardware) -> list[str]:
    """The GPUs that runs may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    In a trial, those of ``gpu_ids`` that belong to its slot.
    """
    if settings.device is Device.cpu or not has_gpu_driver():
        return []
    wanted = None if settings.gpu_ids is None else [str(number) for number in settings.gpu_ids]
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        visible = [name.strip() for name in given.split(",") if name.strip()]
        return [name for name in visible if wanted is None or name in wanted]
    if wanted is not None:
        return wanted
    return [str(number) for number in range(gpu_count())]
