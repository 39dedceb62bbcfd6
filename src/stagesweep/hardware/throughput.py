"""How fast a fit is. Only clocks are read, no tensor: no step waits for a number."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch

from stagesweep.base.view import Batch
from stagesweep.hardware.out_of_memory import peak_mib

# The numbers of a row that are no result.
SPEED = ("samples_per_second", "step_ms", "data_wait", "peak_mib")


@dataclass
class Count:
    """Steps and samples, the seconds they took, and how many of these were spent on data."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def speed(self, device: torch.device) -> dict[str, float]:
        """Samples a second, milliseconds a step, share of the time waited for data, peak memory."""
        seconds = max(self.seconds, 1e-9)
        values = (
            self.samples / seconds,
            1e3 * seconds / max(self.steps, 1),
            self.waited / seconds,
            peak_mib(device),
        )
        return dict(zip(SPEED, values, strict=True))


class Meter:
    """The clock of a fit, over the steps since this process took it up; evaluation is not in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total, self.epoch = Count(), Count()
        self.begun = 0.0
        # Called after each step.
        self.after_step: Callable[[], None] = nothing
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def batches(self, batches: Iterable[Batch], sizes: Iterable[int]) -> Iterator[Batch]:
        """The batches of an epoch, timed; on a GPU, what of a gather the CPU waits for. `sizes` are
        those of the whole batches, of which several processes have parts.
        """
        self.epoch = epoch = Count()
        before = self.begun = perf_counter()
        for batch, size in zip(batches, sizes, strict=True):
            epoch.waited += perf_counter() - before
            epoch.steps += 1
            epoch.samples += size
            yield batch
            self.after_step()
            before = perf_counter()

    def samples_per_second(self) -> float:
        """Of the epoch under way."""
        return self.epoch.samples / max(perf_counter() - self.begun, 1e-9)

    def end_epoch(self) -> dict[str, float]:
        """The speed of the epoch, all of whose numbers have been read by now."""
        epoch, total = self.epoch, self.total
        epoch.seconds = perf_counter() - self.begun
        for name, value in vars(epoch).items():
            setattr(total, name, getattr(total, name) + value)
        return epoch.speed(self.device)

    def summary(self) -> dict[str, float]:
        """The speed of all epochs so far; empty when there was none."""
        return self.total.speed(self.device) if self.total.steps else {}


def nothing() -> None:
    """What most fits do after a step."""
