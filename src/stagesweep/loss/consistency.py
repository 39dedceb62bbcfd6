"""Samples with the same label (animals with the same gene) lie near each other."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.loss.pairs import same_label


class Consistency(nn.Module):
    """Mean squared distance from a sample's latent mean to those of its label's other samples
    in the batch, by latent dimension; a sum over the samples that have such others.
    """

    whole_batch = ("mean",)

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """One matrix expression; (0, 0) when no label occurs twice."""
        mean, index = outputs["mean"].float(), batch["index"]
        partners = same_label(batch, "consistency", self.label) & (index[:, None] != index)
        count = partners.sum(1)
        share = partners / count.clamp(min=1).unsqueeze(1)
        with torch.autocast(mean.device.type, enabled=False):
            # sum_j s_ij |m_i - m_j|^2, expanded, so that no (B, B, d) tensor is made
            square = mean.square().sum(1)
            distance = share.sum(1) * square + share @ square - 2 * (mean * (share @ mean)).sum(1)
        total = distance.sum() / mean.shape[1]
        return total, (count > 0).sum().to(total.dtype)
