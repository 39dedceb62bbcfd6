"""What a run uses of this machine: the hardware profile, resolved."""

import logging
import os
from dataclasses import dataclass

import torch

from stagesweep import config
from stagesweep.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """A profile with every ``auto`` decided. ``autocast`` is None for fp32."""

    device: torch.device
    precision: config.Precision
    autocast: torch.dtype | None
    micro_batch: int | None
    workers: int
    compile: bool
    activation_checkpointing: bool


def resolve(settings: config.Hardware) -> Machine:
    """Decide what the profile leaves open, apply thread settings, and say what was chosen."""
    gpu = torch.cuda.is_available()
    if settings.device is config.Device.cuda and not gpu:
        raise UserError("hardware.device=cuda, but torch finds no GPU; set hardware.device=cpu")
    if settings.devices != 1:
        raise UserError(f"hardware.devices={settings.devices} is not supported yet; set it to 1")
    if settings.micro_batch is not None and settings.micro_batch < 1:
        raise UserError(f"hardware.micro_batch={settings.micro_batch} must be at least 1")
    use_gpu = gpu and settings.device is not config.Device.cpu
    precision = settings.precision
    if precision is config.Precision.auto:
        bf16 = use_gpu and torch.cuda.is_bf16_supported()
        precision = config.Precision.bf16 if bf16 else config.Precision.fp32
    if precision is config.Precision.fp16 and not use_gpu:
        raise UserError("hardware.precision=fp16 needs a GPU; set it to bf16 or fp32")
    threads = settings.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    torch.set_num_threads(threads)
    device = torch.device("cuda" if use_gpu else "cpu")
    name = torch.cuda.get_device_name() if use_gpu else f"cpu, {threads} thread(s)"
    log.info("hardware: %s (%s), %s", device, name, precision)
    formats = {config.Precision.bf16: torch.bfloat16, config.Precision.fp16: torch.float16}
    return Machine(
        device=device,
        precision=precision,
        autocast=formats.get(precision),
        micro_batch=settings.micro_batch,
        workers=settings.workers,
        compile=settings.compile,
        activation_checkpointing=settings.activation_checkpointing,
    )
