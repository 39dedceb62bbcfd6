"""Sampler of a stratified subset of the training clips."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stagesweep.base.view import View
from stagesweep.config.schema import bounded
from stagesweep.systems.speech.data.split import stratified


@dataclass
class Subset:
    """Sample the same subset in every epoch, in random order; each stratum has an equal share.

    `samples` is the number of clips, or a share below 1; None takes all. Subsets with the same
    `seed` are nested: a smaller one is part of a larger one.
    """

    samples: float | int | None = bounded(None, gt=0)
    seed: int = 0

    def rows(self, view: View) -> Tensor:
        """Return the rows (n,) of the subset, in order."""
        return torch.from_numpy(stratified(view["stratum"].cpu().numpy(), self.samples, self.seed))

    def __call__(self, view: View, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Return the rows of each batch of one epoch."""
        rows = self.rows(view)
        return iter(rows[torch.randperm(len(rows), generator=generator)].split(size))
