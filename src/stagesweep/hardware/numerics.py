"""What of the hardware profile changes numbers."""

from typing import Any

from stagesweep.config.schema import Device, Hardware, Precision
from stagesweep.hardware.detection import may_be_there


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
    from stagesweep.hardware.profile import choose

    chosen = choose(settings)
    return {"precision": chosen.precision, "tf32": chosen.tf32}
