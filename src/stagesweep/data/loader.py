"""A split that does not fit in memory: its samples are read in batches, ahead of their use."""

import signal
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch, View


class Samples(Protocol):
    """Samples by number, as a torch ``Dataset`` gives them.

    An item is a dict of tensors whose shapes are the same for all, and depends on its number
    alone: random augmentation has a place of its own (``augment`` of a fit). Samples that are read
    faster together have ``batch(rows) -> columns`` as well, which a view of theirs may finish.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class LoaderView(View):
    """A view that reads `samples` when a batch needs them, in worker processes if there are any.

    `columns` are those known without reading a sample (labels), for samplers; every batch carries
    them, the columns of the samples and ``index``.
    """

    def __init__(self, samples: Samples, columns: Mapping[str, Tensor] | None = None) -> None:
        super().__init__({**(columns or {}), "index": torch.arange(len(samples))})
        self.samples = samples
        self.workers, self.pinned = 0, False

    def take(self, rows: Tensor) -> View:
        """Raises UserError: samples that are read when they are needed are not dealt anew."""
        raise UserError("cross-validation needs data in memory; set data.backed=false")

    def join(self, others: Iterable[View]) -> View:
        """Raises UserError, as `take`."""
        return self.take(torch.empty(0))

    def prepare(self, device: torch.device, workers: int, pinned: bool = True) -> "LoaderView":
        """Read with so many processes, for use on `device`, into memory that a GPU can fetch from
        (`pinned`); the columns stay on the CPU.
        """
        self.workers, self.pinned = workers, pinned and device.type == "cuda"
        return self

    def gather(self, order: Iterable[Tensor], start: int = 0) -> Iterator[Batch]:
        """The batches of `order`, from batch number `start` on; nothing before it is read.

        Raises:
            UserError: a sample raised it, or a worker process died.
        """
        order = list(islice(order, start, None))
        loader: DataLoader[Any] = DataLoader(
            _Batches(self.samples),
            batch_sampler=[rows.tolist() for rows in order],
            collate_fn=_as_is,
            num_workers=self.workers,
            pin_memory=self.pinned,
            worker_init_fn=_leave_signals_to_the_run,
            # Of its own: the loader draws a seed, and the global generators are not to notice.
            generator=torch.Generator(),
        )
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        # The loader would raise the death of a worker anywhere, even in the middle of a step;
        # without its handler it is raised here, where the batch is missing.
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)
        try:
            for rows, batch in zip(order, batches, strict=True):
                if isinstance(batch, UserError):
                    raise batch
                yield batch | {name: c.index_select(0, rows) for name, c in self.columns.items()}
        except Exception as error:
            if not (self.workers and _is_death(error)):
                raise
            raise UserError(
                "a loader process died, most often for want of memory: lower "
                f"hardware.workers={self.workers}; 0 reads without processes"
            ) from error

    def batches(self, size: int) -> Iterator[Batch]:
        """The whole split in order; the last batch may be smaller."""
        return self.gather(torch.arange(len(self)).split(size))


class _Batches(Dataset[Any]):
    """The samples by lists of numbers, as the loader asks for them."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, rows: list[int]) -> Batch | UserError:
        try:
            if (together := getattr(self.samples, "batch", None)) is not None:
                columns: Batch = together(rows)
                return columns
            items = [self.samples[row] for row in rows]
        except (
            UserError
        ) as error:  # raised in a worker it would arrive with a traceback as its text
            return error
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _is_death(error: Exception) -> bool:
    """Whether the loader found a worker gone, or lost it while it handed over a batch.

    What a sample raises in a worker arrives as "Caught … in DataLoader worker process".
    """
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    return isinstance(error, EOFError | OSError) and "in DataLoader worker" not in str(error)


def _as_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the run decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
