"""Epochs over a stratified subset of the training clips."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stagesweep.base.view import View
from stagesweep.systems.speech.data.split import stratified


@dataclass
class Subset:
    """Each epoch has the same `samples`, an equal share of every stratum, in a random order.

    `samples` is their number, or a share below 1, or None for all. Subsets of one `seed` are
    nested: that of fewer samples is part of that of more.
    """

    samples: float | int | None = None
    seed: int = 0

    def rows(self, view: View) -> Tensor:
        """The rows (n,) of the subset, in order."""
        return torch.from_numpy(stratified(view["stratum"].cpu().numpy(), self.samples, self.seed))

    def __call__(self, view: View, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The rows of each batch of one epoch."""
        rows = self.rows(view)
        return iter(rows[torch.randperm(len(rows), generator=generator)].split(size))
