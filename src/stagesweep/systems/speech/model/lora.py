"""Low-rank adapters of many experts in one linear layer (Hu et al. 2021, arXiv:2106.09685)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Route:
    """Which experts act in a forward pass; all layers of a model look at one route.

    `rows` (N,): the expert of each row. `weights` (N, E): how much of each expert is added in each
    row. Neither: the base alone.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.weights: Tensor | None = None

    @contextmanager
    def active(self, rows: Tensor | None = None, weights: Tensor | None = None) -> Iterator[None]:
        """Take this way within the block. A backward pass that computes the forward again (to save
        memory) comes after the block, so that what was set last stays.
        """
        self.rows, self.weights = rows, weights
        yield


class ExpertLinear(nn.Module):
    """A linear layer and E adapters of rank r: W x + (alpha / r) B_e A_e x, e by the route.

    The adapters of all rows are one batched product each; nothing waits for the device. An
    expert's `A` (r, in) begins as in peft, its `B` (out, r) at zero, so that it changes nothing.
    """

    def __init__(
        self,
        base: nn.Linear,
        route: Route,
        experts: int,
        rank: int,
        alpha: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.ParameterList(
            nn.Parameter(torch.empty(rank, base.in_features)) for _ in range(experts)
        )
        self.B = nn.ParameterList(
            nn.Parameter(torch.zeros(base.out_features, rank)) for _ in range(experts)
        )
        for matrix in self.A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        # Shared with the model, which is not to have it once more in each layer.
        self.__dict__["route"] = route

    route: Route

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, in) to (N, T, out)."""
        found: Tensor = self.base(x)
        rows, weights = self.route.rows, self.route.weights
        if rows is None and weights is None:
            return found
        A, B = torch.stack(tuple(self.A)), torch.stack(tuple(self.B))
        x = self.dropout(x)
        if rows is not None:
            low = torch.bmm(x, A[rows].transpose(1, 2))
            return found + self.scale * torch.bmm(low, B[rows].transpose(1, 2))
        assert weights is not None
        low = torch.einsum("nti,eri->nter", x, A) * weights[:, None, :, None].to(x.dtype)
        return found + self.scale * torch.einsum("nter,eor->nto", low, B)
