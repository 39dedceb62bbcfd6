"""Alignment: samples with the same label lie close together."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.loss.positive_pairs import positive_pairs


class Alignment(nn.Module):
    """Mean squared distance between positive pairs (Wang & Isola 2020, section 4.1, alpha = 2).

    A positive pair is two samples of the batch with the same label. The distance is between latent
    means, averaged over latent dimensions and over the partners of a sample; a sum over the samples
    that have a partner. Latent means are not normalised.
    """

    whole_batch = ("mean",)

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples with a partner, and their number; (0, 0) when no label occurs twice."""
        mean, index = outputs["mean"].float(), batch["index"]
        partners = positive_pairs(batch, "consistency", self.label) & (index[:, None] != index)
        count = partners.sum(1)
        share = partners / count.clamp(min=1).unsqueeze(1)
        with torch.autocast(mean.device.type, enabled=False):
            # sum_j s_ij |m_i - m_j|^2, expanded, which needs no (B, B, d) tensor
            square = mean.square().sum(1)
            distance = share.sum(1) * square + share @ square - 2 * (mean * (share @ mean)).sum(1)
        total = distance.sum() / mean.shape[1]
        return total, (count > 0).sum().to(total.dtype)
