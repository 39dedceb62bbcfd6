"""The hardware profile with every ``auto`` decided."""

import logging
import os
from dataclasses import dataclass

import torch

from stagesweep import config
from stagesweep.errors import UserError
from stagesweep.hardware.gpu import devices
from stagesweep.hardware.gpu import may_be_there as gpu_may_be_there

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """A profile with every ``auto`` decided. ``autocast`` is None for fp32."""

    device: torch.device
    precision: config.Precision
    autocast: torch.dtype | None
    threads: int | None
    micro_batch: int | None
    workers: int
    compile: bool
    activation_checkpointing: bool

    def set_threads(self, parameters: int) -> None:
        """Threads of CPU operations for a model of so many parameters.

        Unless the profile says, a model below a million parameters gets one: its operations are
        too short to share, and on a busy machine two threads wait for each other.
        """
        torch.set_num_threads(self.threads or (1 if parameters < 1_000_000 else CORES))


# What torch takes by default: OMP_NUM_THREADS, or else the cores there are.
CORES = torch.get_num_threads()


def resolve(settings: config.Hardware) -> Machine:
    """Decide what the profile leaves open, and say what was chosen."""
    device, precision = choose(settings)
    name = f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else ""
    log.info("hardware: %s%s, %s", device, name, precision)
    formats = {config.Precision.bf16: torch.bfloat16, config.Precision.fp16: torch.float16}
    return Machine(
        device=device,
        precision=precision,
        autocast=formats.get(precision),
        threads=settings.threads,
        micro_batch=settings.micro_batch,
        workers=settings.workers,
        compile=settings.compile,
        activation_checkpointing=settings.activation_checkpointing,
    )


def enough(wanted: int) -> None:
    """UserError when there are fewer GPUs than that."""
    if (there := torch.cuda.device_count()) < wanted:
        raise UserError(
            f"hardware.devices={wanted}, but torch finds {there} GPUs; set it to {there}, or set "
            "hardware.device=cpu"
        )


def choose(settings: config.Hardware) -> tuple[torch.device, config.Precision]:
    """Device and number format; UserError for a profile that this machine cannot follow."""
    gpu = gpu_may_be_there() and torch.cuda.is_available()
    if settings.device is config.Device.cuda and not gpu:
        raise UserError("hardware.device=cuda, but torch finds no GPU; set hardware.device=cpu")
    if settings.gpu_ids is not None and (not gpu or settings.device is config.Device.cpu):
        raise UserError(f"hardware.gpu_ids={settings.gpu_ids}, but no GPU is used; leave it out")
    if gpu and settings.device is not config.Device.cpu:
        enough(max(devices(settings), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))
    if settings.micro_batch is not None and settings.micro_batch < 1:
        raise UserError(f"hardware.micro_batch={settings.micro_batch} must be at least 1")
    use_gpu = gpu and settings.device is not config.Device.cpu
    precision = settings.precision
    if precision is config.Precision.auto:
        bf16 = use_gpu and torch.cuda.is_bf16_supported()
        precision = config.Precision.bf16 if bf16 else config.Precision.fp32
    if precision is config.Precision.fp16 and not use_gpu:
        raise UserError("hardware.precision=fp16 needs a GPU; set it to bf16 or fp32")
    return torch.device("cuda" if use_gpu else "cpu"), precision
