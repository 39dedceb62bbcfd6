"""Samplers that put samples with the same label into one batch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from stagesweep.base.errors import UserError
from stagesweep.base.view import View


class PairSampler:
    """Give every sample a partner with the same label in its batch.

    Each epoch pairs the samples of a label at random, with one group of three where their number
    is odd, and distributes the pairs over the batches. For any data and batch size:

    * every sample is drawn exactly once per epoch;
    * a sample whose label (0 or more) occurs twice in the split has a partner in its batch;
    * there are ceil(n / size) batches, or one per pair if there are fewer pairs;
    * batch sizes differ by at most 3, and none exceeds `size` by more than 2.
    """

    def __init__(self, column: str) -> None:
        self.column = column

    def __call__(self, view: View, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the rows of each batch of an epoch, determined by `generator` alone."""
        if self.column not in view:
            raise UserError(f"sampler.column={self.column}: the data has no such column")
        if size < 2:
            raise UserError(f"batch_size={size} has no room for a pair; use 2 or more")
        rows, units = self._units(view[self.column].cpu(), generator)
        sizes = units.bincount()
        # Distribute units from the largest to the smallest, so that batches fill evenly. The
        # order among units of one size is random.
        shuffled = torch.randperm(len(sizes), generator=generator)
        ordered = shuffled[_order(-sizes[shuffled])]
        batches = min(-(-len(rows) // size), len(sizes))
        number = torch.empty_like(ordered)
        number[ordered] = torch.arange(len(ordered)) % batches
        batch = number[units]
        counts = batch.bincount(minlength=batches).tolist()
        # Shuffle: larger batches should not always come first.
        parts = torch.split(rows[_order(batch)], counts)
        return (parts[i] for i in torch.randperm(batches, generator=generator).tolist())

    @staticmethod
    def _units(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return all rows sorted by label, in random order within it, and the unit of each.

        A unit is two or three samples of one label, or one sample without a partner.
        """
        order = torch.randperm(len(labels), generator=generator)
        rows = order[_order(labels[order])]
        ordered = labels[rows]
        group = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
        counts = group.bincount()
        place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[group]
        # With an odd number, the last sample joins the pair before it.
        pair = torch.minimum(place // 2, (counts[group] // 2 - 1).clamp(min=0))
        first = place == torch.where(ordered < 0, place, 2 * pair)
        return rows, first.cumsum(0) - 1


def _order(codes: Tensor) -> Tensor:
    """Stable argsort of integers; numpy sorts 16-bit integers in linear time."""
    kind = np.int16 if codes.numel() and int(codes.max()) < 2**15 else np.int64
    return torch.from_numpy(np.argsort(codes.numpy().astype(kind), kind="stable"))
