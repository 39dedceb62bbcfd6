"""What a device has too little memory for is done again in smaller parts."""

import logging
import resource
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from stagesweep.base.errors import OutOfMemory
from stagesweep.hardware.profile import Machine

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# What torch says where it raises no OutOfMemoryError: of the CPU's memory, and inside a library.
SAID = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what an error of torch means."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in SAID)


def peak_mib(device: torch.device) -> float:
    """Peak memory in MiB: tensors on a GPU; on the CPU all that this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Room:
    """How many samples the device has room for at once; None: any number, as far as is known.

    It is halved whenever the device runs out of memory. ``events`` has what happened: ``during``
    what, ``from`` how many samples ``to`` how many, at which ``step`` of the fit.
    """

    def __init__(
        self, size: int | None, during: str, machine: Machine, fixed: bool = False
    ) -> None:
        self.size, self.during, self.machine = size, during, machine
        # Of a divided model no process can do anything again by itself.
        self.fixed = fixed
        # Whether the size is still to be found by trying.
        self.unknown = machine.probe
        self.step = 0
        self.events: list[dict[str, Any]] = []

    def within(
        self,
        attempt: Callable[[int], Result],
        most: int,
        undo: Callable[[], object] | None = None,
    ) -> Result:
        """What `attempt` gives for a number of samples, `most` or as many as there is room for;
        `undo` what an attempt that failed has left.
        """
        while True:
            size = min(most, self.size or most)
            try:
                return attempt(size)
            except RuntimeError as error:
                self.shrink(size, error)
            # Here, outside the handler, nothing holds on to the tensors of the failed attempt.
            if undo is not None:
                undo()
            torch.cuda.empty_cache()

    def shrink(self, size: int, error: RuntimeError) -> None:
        """Half of `size`, for which there was no room.

        OutOfMemory when that was one sample; an error that says something else is raised again.
        """
        if not out_of_memory(error):
            raise error
        if size == 1:
            raise OutOfMemory(self._hopeless()) from error
        if self.fixed:
            raise OutOfMemory(
                f"too little memory for {size} samples at a time ({self.during}), and with "
                f"hardware.parallel=shard a step cannot be repeated in smaller parts: set "
                f"hardware.micro_batch={size // 2}"
            ) from error
        self.size = size // 2
        event = {"during": self.during, "from": size, "to": self.size, "step": self.step}
        self.events.append(event)
        log.warning(
            "out of memory in step %d (%s): %d samples at a time instead of %d",
            self.step, self.during, self.size, size,
        )  # fmt: skip

    def _hopeless(self) -> str:
        tried = ", ".join([*(str(event["from"]) for event in self.events), "1"])
        remedies = ["make the model or the samples smaller"]
        if not self.machine.activation_checkpointing:
            remedies.append("set hardware.activation_checkpointing=true")
        if self.machine.device.type != "cpu":
            remedies.append("set hardware.device=cpu")
        return (
            f"the {'GPU' if self.machine.device.type == 'cuda' else 'machine'} has too little "
            f"memory for one sample ({self.during}; tried {tried}; peak "
            f"{peak_mib(self.machine.device):.0f} MiB): {', or '.join(remedies)}"
        )
