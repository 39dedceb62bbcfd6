"""Views of cells. Counts stay sparse until they are collated into a batch."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from stagesweep.base.view import Batch, Sampler, View
from stagesweep.data.loader import LoaderView
from stagesweep.systems.singlecell.data.h5ad import CountSource, IntArray

# Neighbouring rows of a file that are read with one request.
BLOCK_SIZE = 16


def to_dense(counts: csr_matrix, device: torch.device) -> dict[str, Tensor]:
    """Return dense `counts` (B, g) and the library size `library` (B, 1), fp32 on `device`.

    Only non-zero values are transferred to a GPU.
    """
    sums = np.asarray(counts.sum(axis=1), np.float32).reshape(-1, 1)
    # The library size of an empty cell is 1, so that its logarithm is finite.
    library = torch.from_numpy(sums).clamp(min=1).to(device, non_blocking=True)
    if device.type == "cpu":
        return {"counts": torch.from_numpy(counts.toarray()), "library": library}
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    flat = torch.from_numpy(rows * counts.shape[1] + counts.indices)
    out = torch.zeros(counts.shape[0] * counts.shape[1], device=device)
    out[flat.to(device)] = torch.from_numpy(counts.data).to(device)
    return {"counts": out.view(counts.shape), "library": library}


class CellView(View):
    """Cells in memory: labels as columns, counts (n, g) in CSR.

    A batch has the columns, `counts` (B, g) and `library` (B, 1).
    """

    def __init__(self, counts: csr_matrix, columns: Mapping[str, Tensor]) -> None:
        super().__init__({**columns, "index": torch.arange(counts.shape[0])})
        self.counts = counts

    def take(self, rows: Tensor) -> "CellView":
        """Return a view of some cells."""
        return CellView(self.counts[rows.numpy()], super().take(rows).columns)

    def join(self, others: Iterable[View]) -> "CellView":
        """Concatenate this view with others."""
        every = [self, *(view for view in others if isinstance(view, CellView))]
        counts = vstack([view.counts for view in every], "csr")
        return CellView(counts, super().join(every[1:]).columns)

    def gather(self, order: Iterable[Tensor], start: int = 0) -> Iterator[Batch]:
        """The batches of `order`, from batch number `start` on."""
        device = self["index"].device
        for rows in islice(order, start, None):
            batch = to_dense(self.counts[rows.numpy()], device)
            rows = rows.to(device)
            yield batch | {name: c.index_select(0, rows) for name, c in self.columns.items()}

    def batches(self, size: int) -> Iterator[Batch]:
        """The whole split in order; the last batch may be smaller."""
        return self.gather(torch.arange(len(self)).split(size))


class CellDataset:
    """Map-style dataset of some cells and genes of a source, for a data loader."""

    def __init__(self, source: CountSource, rows: IntArray, genes: IntArray) -> None:
        self.source, self.rows, self.genes = source, rows, genes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch([index])

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """Return sparse counts of some cells: `values` and `genes` (nnz,), `pointers` (B + 1,)."""
        counts = self.source.take(self.rows[rows])[:, self.genes]
        arrays = {"values": counts.data, "genes": counts.indices, "pointers": counts.indptr}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class BackedCellView(LoaderView):
    """Cells of a file that does not fit in memory, read batch by batch.

    An epoch visits blocks of neighbouring rows in random order, which makes reading fast. Each
    batch contains many blocks.
    """

    def __init__(self, samples: CellDataset, columns: Mapping[str, Tensor]) -> None:
        super().__init__(samples, columns)
        self.width = len(samples.genes)
        self.device = torch.device("cpu")

    def prepare(self, device: torch.device, workers: int, pinned: bool = True) -> "BackedCellView":
        """Read with `workers` processes; counts become dense on `device`."""
        super().prepare(device, workers, pinned)
        self.device = device
        return self

    def order(
        self, size: int, generator: torch.Generator, sampler: Sampler | None = None
    ) -> Iterator[Tensor]:
        """The rows of each batch of one epoch: shuffled blocks of 16 neighbours."""
        if sampler is not None:
            return super().order(size, generator, sampler)
        shift = int(torch.randint(BLOCK_SIZE, (), generator=generator))
        rows = torch.arange(len(self)).roll(shift)
        blocks = rows.split(BLOCK_SIZE)
        shuffled = [blocks[number] for number in torch.randperm(len(blocks), generator=generator)]
        return iter(torch.cat(shuffled).split(size))

    def gather(self, order: Iterable[Tensor], start: int = 0) -> Iterator[Batch]:
        """The batches of `order`, from batch number `start` on; earlier batches are not read."""
        for batch in super().gather(order, start):
            parts = [batch.pop(name).numpy() for name in ("values", "genes", "pointers")]
            counts = csr_matrix(tuple(parts), (len(parts[2]) - 1, self.width))
            yield to_dense(counts, self.device) | batch
