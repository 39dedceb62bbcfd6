"""Samples that belong together are drawn together, all others apart."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.loss.pairs import same_label


class Contrastive(nn.Module):
    """Supervised contrastive loss over both views of a batch (Khosla et al. 2020, eq. 2).

    The positives of a view are the other view of the same sample and, where `label` names a
    column, all views of samples with the same label; a sample without a label has its own other
    view only. With no label at all this is NT-Xent (Chen et al. 2020). A sum over the 2B views.
    """

    whole_batch = ("projection", "positive/projection")

    def __init__(self, temperature: float = 0.5, label: str | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        self.label = label

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """One masked matrix product over the 2B projections, which have length one."""
        views = torch.cat([outputs[name] for name in self.whole_batch]).float()
        index = batch["index"]
        # A sample that was drawn twice is its own positive, never its own negative.
        together = index[:, None] == index
        if self.label is not None:
            together = together | same_label(batch, "contrastive", self.label)
        positives = together.repeat(2, 2).fill_diagonal_(False)
        with torch.autocast(views.device.type, enabled=False):
            similarity = views @ views.T / self.temperature
        # -inf would turn 0 * -inf into NaN below; this is as good as -inf in fp32.
        itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        others = similarity.masked_fill(itself, -1e9)
        log_share = others.log_softmax(1)
        total = -((log_share * positives).sum(1) / positives.sum(1)).sum()
        return total, total.new_full((), len(views))
