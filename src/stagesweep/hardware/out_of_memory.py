"""Retries work in smaller batches when the device runs out of memory."""

import gc
import logging
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from stagesweep.base.errors import OutOfMemory
from stagesweep.hardware.profile import HardwareProfile

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Messages of errors that are not a torch.OutOfMemoryError: of the CPU's memory, and of libraries.
MESSAGES = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch means that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(m in str(error) for m in MESSAGES)


def drop_frames(error: BaseException) -> None:
    """Free the objects that the traceback of a handled error still holds.

    The frames in its traceback keep their tensors for as long as anything refers to the error, and
    often one of these frames does.
    """
    chain: list[BaseException] = []
    following: list[BaseException | None] = [error]
    while following:
        each = following.pop()
        if each is not None and each not in chain:
            chain.append(each)
            following += [each.__cause__, each.__context__]
    for each in chain:
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = None


def free_memory() -> None:
    """Free tensors in reference cycles, and return the allocator's unused blocks to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def peak_mib(device: torch.device) -> float:
    """Peak memory in MiB: of tensors on a GPU; on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class OutOfMemoryRetry:
    """Runs work with at most `size` samples at a time (None: no limit), and halves the size
    whenever the device runs out of memory.

    ``events`` lists what happened: ``during`` which phase, ``from`` how many samples ``to`` how
    many, at which ``step`` of the fit.
    """

    def __init__(
        self, size: int | None, phase: str, hardware: HardwareProfile, can_retry: bool = True
    ) -> None:
        self.size, self.phase, self.hardware = size, phase, hardware
        # False for a sharded model: no process can repeat anything by itself.
        self.can_retry = can_retry
        self.step = 0
        self.events: list[dict[str, Any]] = []

    def run(
        self,
        work: Callable[[int], Result],
        samples: int,
        cleanup: Callable[[], object] | None = None,
    ) -> Result:
        """The result of `work` for a number of samples: `samples`, or as many as fit.

        `cleanup` undoes what a failed try has left.
        """
        while True:
            size = min(samples, self.size or samples)
            try:
                return work(size)
            except RuntimeError as error:
                self.halve(size, error)
                drop_frames(error)
            # Outside the handler, where the error itself is gone.
            if cleanup is not None:
                cleanup()
            free_memory()

    def halve(self, size: int, error: RuntimeError) -> None:
        """Halve `size`, which did not fit.

        OutOfMemory when it was one sample; an error of another kind is raised again.
        """
        if not is_out_of_memory(error):
            raise error
        if size == 1:
            raise OutOfMemory(self._one_sample_message()) from error
        if not self.can_retry:
            raise OutOfMemory(
                f"too little memory for {size} samples at a time ({self.phase}), and with "
                f"hardware.parallel=shard a step cannot be repeated in smaller parts: set "
                f"hardware.micro_batch={size // 2}"
            ) from error
        self.size = size // 2
        event = {"during": self.phase, "from": size, "to": self.size, "step": self.step}
        self.events.append(event)
        log.warning(
            "out of memory in step %d (%s): %d samples at a time instead of %d",
            self.step, self.phase, self.size, size,
        )  # fmt: skip

    def _one_sample_message(self) -> str:
        tried = ", ".join([*(str(event["from"]) for event in self.events), "1"])
        remedies = ["make the model or the samples smaller"]
        if not self.hardware.activation_checkpointing:
            remedies.append("set hardware.activation_checkpointing=true")
        if self.hardware.device.type != "cpu":
            remedies.append("set hardware.device=cpu")
        return (
            f"the {'GPU' if self.hardware.device.type == 'cuda' else 'machine'} has too little "
            f"memory for one sample ({self.phase}; tried {tried}; peak "
            f"{peak_mib(self.hardware.device):.0f} MiB): {', or '.join(remedies)}"
        )
