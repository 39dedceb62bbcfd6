"""Layers that both models use."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def hidden_layers(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear layers, each with LayerNorm, SiLU and dropout.

    LayerNorm, because a sample must not depend on the others of its micro-batch.
    """
    blocks = [
        nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.SiLU(), nn.Dropout(dropout))
        for a, b in pairwise(widths)
    ]
    return nn.Sequential(*blocks)


class MLP(nn.Module):
    """Multilayer perceptron: hidden layers of `widths`, and a linear layer with `out` outputs."""

    def __init__(self, widths: Sequence[int], out: int, dropout: float) -> None:
        super().__init__()
        self.hidden = hidden_layers(widths, dropout)
        self.out = nn.Linear(widths[-1], out)

    def forward(self, values: Tensor) -> Tensor:
        """(B, widths[0]) -> (B, out)."""
        result: Tensor = self.out(self.hidden(values))
        return result
