"""Stress of multidimensional scaling: latent distances match the distances between samples."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch

# A batch is shuffled, so the pairs within blocks are a random sample of all pairs. All pairs of
# 512 samples took longer than the model; those in blocks of 128 take a sixth of that.
PARTNERS = 128


class RawStress(nn.Module):
    """Raw stress of the latent means (Kruskal 1964, eq. 1).

    The squared difference between the distance of two samples in the latent space and `scale` times
    their distance in the standardised `feature`; a mean over the pairs in each block of the batch
    (see `PARTNERS`), a sum over samples.

    A variational posterior stretches dense regions until they are as wide as sparse ones, so
    k-means splits a large homogeneous group into as many clusters as several small distinct ones.
    The stress keeps the distances of the measurements. The distance of a pair with missing values
    is over the features that both have, scaled up to all features.

    `noise` is the standard deviation of repeated measurements of one sample, in standardised units.
    Samples that are no further from the mean than the noise are shrunk towards it (see `shrink`),
    so that no cluster border runs through them.
    """

    whole_batch = ("mean",)

    def __init__(self, feature: str, scale: float = 1.0, noise: float = 0.0) -> None:
        super().__init__()
        self.feature = feature
        self.scale = scale
        self.noise = noise

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples of the mean over their partners, and the number of samples."""
        mean, value = blocks(outputs["mean"].float()), batch[self.feature].float()
        mask = batch.get(f"{self.feature}/mask")
        seen = torch.ones_like(value) if mask is None else mask.float()
        with torch.autocast(mean.device.type, enabled=False):
            wanted = distances(blocks(shrink(value, seen, self.noise)), blocks(seen))
            stress = distances(mean, torch.ones_like(mean)) - self.scale * wanted
        total = stress.square().sum() / max(stress.shape[-1] - 1, 1)
        return total, total.new_full((), stress.shape[:2].numel())


def blocks(rows: Tensor) -> Tensor:
    """Cut rows (B, w) into blocks (n, m, w), m about `PARTNERS`; fewer than n rows are left out."""
    count = max(len(rows) // PARTNERS, 1)
    size = len(rows) // count
    return rows[: count * size].view(count, size, -1)


def shrink(points: Tensor, seen: Tensor, noise: float) -> Tensor:
    """Multiply points (B, w) by s / (s + noise^2), s the mean square of a point's observed values.

    A Wiener filter in which each point's own power is the estimate of the signal's. `seen` (B, w)
    is 1 where a value was observed.
    """
    power = (points * seen).square().sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
    return points * power / (power + noise**2).clamp(min=torch.finfo(points.dtype).tiny)


def distances(points: Tensor, seen: Tensor) -> Tensor:
    """Euclidean distances (n, m, m) of points (n, m, w) over the features that both have.

    A pair without a common feature has distance zero.
    """
    points = points * seen
    square = points.square() @ seen.mT
    shared = seen @ seen.mT
    both = (square + square.mT - 2 * points @ points.mT) * (points.shape[-1] / shared.clamp(min=1))
    # The gradient of the root is infinite at zero, the distance of equal samples.
    return both.clamp(min=1e-6).sqrt()
