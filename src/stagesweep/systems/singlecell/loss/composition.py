"""How far told proportions are from true ones."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch


class Composition(nn.Module):
    """KL(true || told) of proportions (B, k), a sum over samples; a type that is absent adds
    nothing of its own. Reads `log_proportions` of the model and the column `proportions`.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples, and their number."""
        true = batch["proportions"]
        told = outputs["log_proportions"].float()
        total = (torch.xlogy(true, true) - true * told).sum()
        return total, total.new_full((), len(true))
