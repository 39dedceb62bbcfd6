"""Samples that differ in what was measured lie as far apart in the latent space."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch

# A batch is shuffled, so pairs within a block are a sample of all pairs; 512 samples in blocks of
# 128 cost a sixth of all their pairs, which took longer than the model.
PARTNERS = 128


class Geometry(nn.Module):
    """Raw stress of the latent means (Kruskal 1964, eq. 1): the squared difference between the
    distance of two samples in the latent space and in the standardised `feature`, a mean over the
    pairs in each block of the batch (see `PARTNERS`); a sum over samples.

    A variational posterior stretches dense regions until they are as wide as sparse ones, and so
    cuts the many healthy animals into as many clusters as the few deaf ones. Distances that stay
    those of the measurements keep what k-means sees in them. A missing value takes no part: the
    distance of a pair is over what both have, scaled up to all features.

    `noise` is the standard deviation, in standardised units, of what a second measurement of the
    same sample would change. Samples that lie no further from the mean than it puts them are
    drawn together there (see `shrink`), so that no cluster border runs through them.
    """

    whole_batch = ("mean",)

    def __init__(self, feature: str, scale: float = 1.0, noise: float = 0.0) -> None:
        super().__init__()
        self.feature = feature
        self.scale = scale
        self.noise = noise

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples of the mean over their partners."""
        mean, value = blocks(outputs["mean"].float()), batch[self.feature].float()
        mask = batch.get(f"{self.feature}/mask")
        seen = torch.ones_like(value) if mask is None else mask.float()
        with torch.autocast(mean.device.type, enabled=False):
            wanted = distances(blocks(shrink(value, seen, self.noise)), blocks(seen))
            stress = distances(mean, torch.ones_like(mean)) - self.scale * wanted
        total = stress.square().sum() / max(stress.shape[-1] - 1, 1)
        return total, total.new_full((), stress.shape[:2].numel())


def blocks(rows: Tensor) -> Tensor:
    """Cut rows (B, w) into blocks (n, m, w) of about `PARTNERS`; fewer than n rows are left out."""
    count = max(len(rows) // PARTNERS, 1)
    size = len(rows) // count
    return rows[: count * size].view(count, size, -1)


def shrink(points: Tensor, seen: Tensor, noise: float) -> Tensor:
    """Points (B, w) times s / (s + noise^2), s being a point's mean square over what it has seen:
    Wiener's filter with the power of each point as its own estimate of the signal's.
    """
    power = (points * seen).square().sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
    return points * power / (power + noise**2).clamp(min=torch.finfo(points.dtype).tiny)


def distances(points: Tensor, seen: Tensor) -> Tensor:
    """Euclidean distances (n, m, m) of points (n, m, w) over the features that both have; a pair
    that has none in common is at distance zero.
    """
    points = points * seen
    square = points.square() @ seen.mT
    shared = seen @ seen.mT
    both = (square + square.mT - 2 * points @ points.mT) * (points.shape[-1] / shared.clamp(min=1))
    # The root has no slope at zero, where equal samples are.
    return both.clamp(min=1e-6).sqrt()
