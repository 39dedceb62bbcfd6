"""The part of a hardware profile that changes results."""

from typing import Any

from stagesweep.config.schema import Device, Hardware, Precision
from stagesweep.hardware.detection import has_gpu_driver


def numerics(settings: Hardware) -> dict[str, Any]:
    """The settings that change results, as resolved on this machine: precision and tf32.

    Imports torch only where it must. The other settings change nothing, or the last bits as any two
    GPUs do: which algorithm cuDNN picks, what a compiler fuses. UserError for a profile that this
    machine cannot follow, as far as that is checked here.
    """
    needs_gpu = settings.device is Device.cuda or settings.precision is Precision.fp16
    if not needs_gpu and (settings.device is Device.cpu or not has_gpu_driver()):
        auto = settings.precision is Precision.auto
        return {"precision": Precision.fp32 if auto else settings.precision, "tf32": False}
    from stagesweep.hardware.profile import choose_device

    chosen = choose_device(settings)
    return {"precision": chosen.precision, "tf32": chosen.tf32}
