"""The gate: predicts the experts of a clip from its mean encoder state."""

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Linear, ReLU, linear: (B, width) to logits (B, experts).

    Experts that are not `active` are never chosen; this is used if there are fewer clusters than
    experts.
    """

    active: Tensor

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, experts))
        self.register_buffer("active", torch.ones(experts, dtype=torch.bool))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits, at least in fp32; inactive experts have the lowest finite value."""
        logits: Tensor = self.layers(pooled)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.masked_fill(~self.active, torch.finfo(logits.dtype).min)
