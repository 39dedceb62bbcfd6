"""InfoNCE between groups of samples."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.loss.positive_pairs import positive_pairs


class InfoNCE(nn.Module):
    """InfoNCE (van den Oord et al. 2018) of `projection` (B, d), which has length one.

    The positives of a sample are the other samples with its value of the column `group`. Its
    negatives are the samples of other groups only. A mean over positives, a sum over the samples
    that have one.
    """

    whole_batch = ("projection",)

    def __init__(self, group: str, temperature: float = 0.07) -> None:
        super().__init__()
        self.group, self.temperature = group, temperature

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples with a positive, and their number."""
        points = outputs["projection"].float()
        together = positive_pairs(batch, "info_nce", self.group)
        itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
        positives = together & ~itself
        with torch.autocast(points.device.type, enabled=False):
            similarity = points @ points.T / self.temperature
        apart = similarity.masked_fill(together | itself, -1e9).logsumexp(1, keepdim=True)
        # Each positive against itself and the negatives.
        cost = torch.logaddexp(similarity, apart) - similarity
        number = positives.sum(1)
        total = ((cost * positives).sum(1) / number.clamp(min=1)).sum()
        return total, (number > 0).sum().to(total)
