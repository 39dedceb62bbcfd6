"""A split that does not fit in memory: a DataLoader reads its batches ahead of their use."""

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
    """Samples by index, as in a torch ``Dataset``.

    An item is a dict of tensors of the same shapes for every sample. It depends on the index
    alone: random augmentation belongs in ``augment`` of a fit. Samples that are faster to read
    together also define ``batch(rows) -> columns``, which a subclass of the view may complete.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class LoaderView(View):
    """A view that reads `samples` on demand, optionally in worker processes.

    `columns` are known without reading a sample (labels), so that samplers can use them. Every
    batch has these columns, those of the samples, and ``index``.
    """

    def __init__(self, samples: Samples, columns: Mapping[str, Tensor] | None = None) -> None:
        super().__init__({**(columns or {}), "index": torch.arange(len(samples))})
        self.samples = samples
        self.workers, self.pinned = 0, False

    def take(self, rows: Tensor) -> View:
        """Raises UserError: a subset needs the samples in memory."""
        raise UserError("cross-validation needs data in memory; set data.backed=false")

    def join(self, others: Iterable[View]) -> View:
        """Raises UserError, as `take` does."""
        return self.take(torch.empty(0))

    def prepare(self, device: torch.device, workers: int, pinned: bool = True) -> "LoaderView":
        """Set the number of worker processes, and whether batches for a GPU are `pinned`.

        The columns stay on the CPU.
        """
        self.workers, self.pinned = workers, pinned and device.type == "cuda"
        return self

    def gather(self, order: Iterable[Tensor], start: int = 0) -> Iterator[Batch]:
        """The batches of `order`, from batch number `start` on; earlier ones are not read.

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
            worker_init_fn=_ignore_interrupt,
            # The loader draws a seed, which must not advance the global generator.
            generator=torch.Generator(),
        )
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        # The loader's signal handler raises the death of a worker anywhere, even in the middle
        # of a step. Without it, the error is raised here, where the batch is missing.
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
    """Reads a list of samples as one batch."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, rows: list[int]) -> Batch | UserError:
        try:
            if (together := getattr(self.samples, "batch", None)) is not None:
                columns: Batch = together(rows)
                return columns
            items = [self.samples[row] for row in rows]
        except UserError as error:
            # Returned, because an error raised in a worker arrives with a traceback as its text.
            return error
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _is_death(error: Exception) -> bool:
    """Whether a worker process died, either between batches or while it sent one.

    An error that a sample raises in a worker reads "Caught … in DataLoader worker process".
    """
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    return isinstance(error, EOFError | OSError) and "in DataLoader worker" not in str(error)


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_interrupt(worker: int) -> None:
    """Ignore Ctrl-C, which reaches every process of the terminal; the run stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
