"""The gate, which tells from a clip's mean encoder state which experts it needs."""

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Linear, ReLU, linear: (B, width) to scores (B, experts).

    Experts that are not `active` (fewer clusters were found than there are experts) are never
    chosen.
    """

    active: Tensor

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, experts))
        self.register_buffer("active", torch.ones(experts, dtype=torch.bool))

    def forward(self, pooled: Tensor) -> Tensor:
        """Scores, in fp32 at least, the lowest there are where an expert is not active."""
        scores: Tensor = self.layers(pooled)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.masked_fill(~self.active, torch.finfo(scores.dtype).min)
