"""A split held in memory: named columns and batches by one indexed gather."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from stagesweep.data.spec import Spec

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

    def to(self, device: torch.device) -> "View":
        """Move all columns to `device`, so that a batch is one gather there."""
        self.columns = {name: column.to(device) for name, column in self.columns.items()}
        return self

    def batches(
        self,
        size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        sampler: Sampler | None = None,
        start: int = 0,
    ) -> Iterator[Batch]:
        """Batches of one epoch, from batch number `start` on; the last one may be smaller.

        The order is decided by `generator` alone, before the first batch, so that an interrupted
        epoch goes on exactly where it stopped.
        """
        for number, index in enumerate(self._indices(size, shuffle, generator, sampler)):
            if number >= start:
                index = index.to(self.columns["index"].device)
                yield {name: column[index] for name, column in self.columns.items()}

    def _indices(
        self,
        size: int,
        shuffle: bool,
        generator: torch.Generator | None,
        sampler: Sampler | None,
    ) -> Iterator[Tensor]:
        if sampler is not None:
            assert generator is not None, "a sampler draws from a generator"
            return sampler(self, size, generator)
        order = torch.randperm(len(self), generator=generator) if shuffle else self["index"]
        return iter(order.split(size))


class Data(Protocol):
    """A data set: its spec, and its splits by name (train, val, test)."""

    spec: Spec

    def split(self, name: str) -> View:
        """The named split; raises UserError naming the splits there are."""
        ...
