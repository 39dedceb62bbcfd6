"""A split in memory: named columns of equal length. A batch is one indexed gather."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from stagesweep.base.spec import Spec

Batch = dict[str, Tensor]
# (view, batch size, generator) -> one index tensor a batch, covering one epoch
Sampler = Callable[["View", int, torch.Generator], Iterator[Tensor]]


class View:
    """Named columns of equal length; the first dimension is the sample.

    Every batch carries ``index``, the row of each sample in this view.
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns must have one length, got {lengths}")
        self.columns = dict(columns)
        self.columns["index"] = torch.arange(len(self))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def take(self, rows: Tensor) -> "View":
        """A view of the given rows."""
        return View({n: c[rows.to(c.device)] for n, c in self.columns.items() if n != "index"})

    def join(self, others: Iterable["View"]) -> "View":
        """Concatenate views that have the same columns."""
        every = [self, *others]
        names = [name for name in self.columns if name != "index"]
        return View({name: torch.cat([view[name] for view in every]) for name in names})

    def prepare(self, device: torch.device, workers: int, pinned: bool = True) -> "View":
        """Move all columns to `device`, so that a batch is one gather there. Uses no workers."""
        self.columns = {name: column.to(device) for name, column in self.columns.items()}
        return self

    def order(
        self, size: int, generator: torch.Generator, sampler: Sampler | None = None
    ) -> Iterator[Tensor]:
        """The rows of each batch of one shuffled epoch; `generator` alone decides them."""
        if sampler is not None:
            return sampler(self, size, generator)
        return iter(torch.randperm(len(self), generator=generator).split(size))

    def gather(self, order: Iterable[Tensor], start: int = 0) -> Iterator[Batch]:
        """The batches of `order` from number `start` on, each by one indexed gather."""
        device = self["index"].device
        for rows in islice(order, start, None):
            rows = rows.to(device)
            yield {name: column.index_select(0, rows) for name, column in self.columns.items()}

    def batches(self, size: int) -> Iterator[Batch]:
        """The whole split in order; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield {name: column[start : start + size] for name, column in self.columns.items()}


class Data(Protocol):
    """A data set: its spec, and its splits by name (train, val, test)."""

    spec: Spec

    def split(self, name: str) -> View:
        """The named split; UserError lists the splits there are."""
        ...
