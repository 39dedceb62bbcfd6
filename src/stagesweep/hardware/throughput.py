"""Measures how fast a fit is. It reads clocks and no tensors, so no step waits for the device."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch

from stagesweep.base.view import Batch
from stagesweep.hardware.out_of_memory import peak_mib

# Columns of an epoch that measure speed.
SPEED = ("samples_per_second", "step_ms", "data_wait", "peak_mib")


@dataclass
class Counters:
    """Steps and samples, their seconds, and the seconds spent waiting for data."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def speed(self, device: torch.device) -> dict[str, float]:
        """Samples a second, milliseconds a step, share of time waiting for data, peak memory."""
        seconds = max(self.seconds, 1e-9)
        values = (
            self.samples / seconds,
            1e3 * seconds / max(self.steps, 1),
            self.waited / seconds,
            peak_mib(device),
        )
        return dict(zip(SPEED, values, strict=True))


class Throughput:
    """Throughput of the training steps that this process has done; evaluation is excluded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total, self.epoch = Counters(), Counters()
        self.epoch_start = 0.0
        # Called after each step, by the profiler.
        self.after_step: Callable[[], None] = no_op
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def batches(self, batches: Iterable[Batch], sizes: Iterable[int]) -> Iterator[Batch]:
        """Time the batches of an epoch; `sizes` are those of the batches over all processes.

        On a GPU only the part of a gather that the CPU waits for counts.
        """
        self.epoch = epoch = Counters()
        before = self.epoch_start = perf_counter()
        for batch, size in zip(batches, sizes, strict=True):
            epoch.waited += perf_counter() - before
            epoch.steps += 1
            epoch.samples += size
            yield batch
            self.after_step()
            before = perf_counter()

    def samples_per_second(self) -> float:
        """Throughput of the current epoch."""
        return self.epoch.samples / max(perf_counter() - self.epoch_start, 1e-9)

    def end_epoch(self) -> dict[str, float]:
        """The speed of the epoch. Call it after its numbers were read from the device."""
        epoch, total = self.epoch, self.total
        epoch.seconds = perf_counter() - self.epoch_start
        for name, value in vars(epoch).items():
            setattr(total, name, getattr(total, name) + value)
        return epoch.speed(self.device)

    def summary(self) -> dict[str, float]:
        """The speed of all epochs so far; empty when there was none."""
        return self.total.speed(self.device) if self.total.steps else {}


def no_op() -> None:
    """Do nothing."""
