"""Supervised contrastive loss (SupCon), and NT-Xent where there is no label."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.loss.positive_pairs import positive_pairs


class SupervisedContrastive(nn.Module):
    """Supervised contrastive loss over both views of a batch (Khosla et al. 2020, eq. 2).

    The positives of a view are the other view of the same sample and, if `label` names a column,
    all views of samples with the same label. A sample without a label has only its own other view.
    With `label` null this is NT-Xent (Chen et al. 2020). A sum over the 2B views.
    """

    whole_batch = ("projection", "positive/projection")

    def __init__(self, temperature: float = 0.5, label: str | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        self.label = label

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over the 2B views, and their number; the projections have length one."""
        views = torch.cat([outputs[name] for name in self.whole_batch]).float()
        index = batch["index"]
        # A sample that is in the batch twice is a positive of itself, not a negative.
        together = index[:, None] == index
        if self.label is not None:
            together = together | positive_pairs(batch, "contrastive", self.label)
        positives = together.repeat(2, 2).fill_diagonal_(False)
        with torch.autocast(views.device.type, enabled=False):
            similarity = views @ views.T / self.temperature
        # 0 * -inf would be NaN below; -1e9 is as good in fp32.
        itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        others = similarity.masked_fill(itself, -1e9)
        log_share = others.log_softmax(1)
        total = -((log_share * positives).sum(1) / positives.sum(1)).sum()
        return total, total.new_full((), len(views))
