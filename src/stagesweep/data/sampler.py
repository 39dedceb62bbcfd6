"""Batches in which samples that share a label meet."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from stagesweep.base.errors import UserError
from stagesweep.base.view import View


class PairSampler:
    """Give every sample a partner with the same label (animals: the same gene) in its batch.

    Each epoch the samples of a label are paired anew at random (three together where their number
    is odd), and the pairs are dealt to the batches. This holds for any data and batch size:
    every sample is drawn exactly once an epoch; every sample whose label (0 or more) occurs twice
    in the split shares its batch with another of that label; there are ceil(n / size) batches (or
    one for each pair, where there are fewer); their sizes differ by at most 3, so that one can be
    at most 2 larger than `size`.
    """

    def __init__(self, column: str) -> None:
        self.column = column

    def __call__(self, view: View, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the rows of each batch of an epoch; `generator` alone decides."""
        if self.column not in view:
            raise UserError(f"sampler.column={self.column}: the data has no such column")
        if size < 2:
            raise UserError(f"batch_size={size} has no room for a pair; use 2 or more")
        rows, units = self._units(view[self.column].cpu(), generator)
        sizes = units.bincount()
        # Deal from the largest unit to the smallest, so that the batches fill up evenly; among
        # units of one size the order is random.
        shuffled = torch.randperm(len(sizes), generator=generator)
        dealt = shuffled[_order(-sizes[shuffled])]
        batches = min(-(-len(rows) // size), len(sizes))
        number = torch.empty_like(dealt)
        number[dealt] = torch.arange(len(dealt)) % batches
        batch = number[units]
        counts = batch.bincount(minlength=batches).tolist()
        # Batches with more pairs than others should not always come first.
        parts = torch.split(rows[_order(batch)], counts)
        return (parts[i] for i in torch.randperm(batches, generator=generator).tolist())

    @staticmethod
    def _units(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return all rows in random order within their label, and the unit each belongs to.

        A unit is a pair or three of one label, or one sample that has no partner.
        """
        order = torch.randperm(len(labels), generator=generator)
        rows = order[_order(labels[order])]
        ordered = labels[rows]
        group = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
        counts = group.bincount()
        place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[group]
        # The last of an odd number joins the pair before it.
        pair = torch.minimum(place // 2, (counts[group] // 2 - 1).clamp(min=0))
        first = place == torch.where(ordered < 0, place, 2 * pair)
        return rows, first.cumsum(0) - 1


def _order(codes: Tensor) -> Tensor:
    """Return the stable order of integers; numpy sorts those of 16 bits in linear time."""
    kind = np.int16 if codes.numel() and int(codes.max()) < 2**15 else np.int64
    return torch.from_numpy(np.argsort(codes.numpy().astype(kind), kind="stable"))
