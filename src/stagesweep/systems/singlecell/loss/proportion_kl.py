"""Error between predicted and true proportions."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch


class ProportionKL(nn.Module):
    """KL(true || predicted) of proportions (B, k), summed over samples.

    Absent types contribute nothing. Reads the output `log_proportions` and the column
    `proportions`.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum over samples and the number of samples."""
        true = batch["proportions"]
        predicted = outputs["log_proportions"].float()
        total = (torch.xlogy(true, true) - true * predicted).sum()
        return total, total.new_full((), len(true))
