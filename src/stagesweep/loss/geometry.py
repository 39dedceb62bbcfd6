"""Samples that differ in what was measured lie as far apart in the latent space."""

import torch
from torch import Tensor, nn

from stagesweep.data.view import Batch


class Geometry(nn.Module):
    """Raw stress of the latent means (Kruskal 1964, eq. 1): the squared difference between the
    distance of two samples in the latent space and in the standardised `feature`, a mean over the
    pairs of the batch; a sum over samples.

    A variational posterior stretches dense regions until they are as wide as sparse ones, and so
    cuts the many healthy animals into as many clusters as the few deaf ones. Distances that stay
    those of the measurements keep what k-means sees in them. A missing value takes no part: the
    distance of a pair is over what both have, scaled up to all features.
    """

    whole_batch = ("mean",)

    def __init__(self, feature: str, scale: float = 1.0) -> None:
        super().__init__()
        self.feature = feature
        self.scale = scale

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples of the mean over their partners in the batch."""
        mean, value = outputs["mean"].float(), batch[self.feature].float()
        mask = batch.get(f"{self.feature}/mask")
        seen = torch.ones_like(value) if mask is None else mask.float()
        with torch.autocast(mean.device.type, enabled=False):
            stress = distances(mean, torch.ones_like(mean)) - self.scale * distances(value, seen)
        total = stress.square().sum() / max(len(mean) - 1, 1)
        return total, total.new_full((), len(mean))


def distances(points: Tensor, seen: Tensor) -> Tensor:
    """Euclidean distances (B, B) of points (B, w) over the features that both have; a pair that
    has none in common is at distance zero.
    """
    points = points * seen
    square = points.square() @ seen.T
    shared = seen @ seen.T
    both = (square + square.T - 2 * points @ points.T) * (points.shape[1] / shared.clamp(min=1))
    # The root has no slope at zero, where equal samples are.
    return both.clamp(min=1e-6).sqrt()
